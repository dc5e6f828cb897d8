"""One browser: launched, served, watched, reported."""
