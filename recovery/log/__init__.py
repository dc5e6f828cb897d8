"""The control log: events on disk before anything is done about them."""
