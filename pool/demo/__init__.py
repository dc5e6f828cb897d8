"""`make demo`: real browsers, some of which are killed."""
