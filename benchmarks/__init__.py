"""Measurements: of what the project claims, against what one would use instead, written to benchmarks/results."""
