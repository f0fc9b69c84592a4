"""Operators and modules of packed linears."""
