"""All use of Ray: workers, handles to them, clusters for tests, metrics."""
