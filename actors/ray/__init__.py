"""The door to Ray: workers, handles to them, clusters for tests, metrics."""
