"""Fault injection: a browser or a supervisor is broken from inside, as it may be broken in use.

`injector` and `supervisor` inject; `actions` is the table of what each kind of fault does to a
browser. Whether a fault really happened is for others to say (`pool.chaos.evidence`).
"""
