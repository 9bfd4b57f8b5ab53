"""Commands around a run: generate, inspect, and what the later rooms add."""
