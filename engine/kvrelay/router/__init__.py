"""The router: sends each request through a (prefill, decode) pair and measures what it cost.

`core` is pure (messages and times in, messages and updates out), `policies` choose pairs, `runtime` owns the
sockets and the thread.
"""
