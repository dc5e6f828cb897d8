"""Processes below a browser: its driver, profile and session, and who ends them."""
