"""The HTTP server: OpenAI's endpoints, and ours, in front of one engine.

`requests` and `responses` are the documents, `generation` runs them, `app` is the table of routes, `gate`
what every request must pass, `run` the process. Knows text and HTTP; knows no tensors and no scheduling.
"""
