"""`make demo`: real browsers, some of them killed."""
