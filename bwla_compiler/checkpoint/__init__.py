"""Packed checkpoints on disk and their way into transformers."""
