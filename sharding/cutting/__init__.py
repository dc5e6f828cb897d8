"""Models cut by layer: where, into what, for which browsers."""
