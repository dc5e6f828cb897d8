"""One browser: launching, serving, monitoring and reporting it."""
