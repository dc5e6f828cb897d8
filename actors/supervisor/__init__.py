"""The supervisor: what it wants of browsers, and how it gets it."""
