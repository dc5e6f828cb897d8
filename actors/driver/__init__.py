"""A browser's processes: driver, profile, session, and their reaper."""
