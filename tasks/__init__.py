"""Benchmark items and where they come from."""
