"""Capture to one normal form, basis analysis, and the plan."""
