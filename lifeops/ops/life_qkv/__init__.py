"""Queries, keys and values with the LIFE scales."""
