"""The supervisor: keeps the desired browsers and models running."""
