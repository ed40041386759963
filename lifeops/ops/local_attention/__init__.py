"""Attention with one depth-wise convolution for queries, keys and values."""
