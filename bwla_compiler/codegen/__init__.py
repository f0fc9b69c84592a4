"""Emission, compilation and loading of kernels."""
