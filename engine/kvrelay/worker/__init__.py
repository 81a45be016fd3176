"""The worker process: a prefill side and a decode side over one pool, one store and one model.

Every worker can do both; which requests it gets is the router's choice, and that is all a role is.
"""
