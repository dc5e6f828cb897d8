"""Text in images, around the two graphs that find and read it: pages, lines, dictionaries."""
