"""Tensor math. Imports torch only."""
