"""Models as graphs: cutting them by layer, and running the pieces in order."""
