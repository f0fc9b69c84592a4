"""Streaming of calibration tokens through the captured graph, and the fit of each group."""
