"""The history: samples of what is over, in one DuckDB file, and what can be read from them."""
