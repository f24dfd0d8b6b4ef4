"""Kernels: reference.py is the specification, the other files are fast paths that compute the same functions."""
