"""Depth-wise convolution over patch tokens, with and without a prologue and an epilogue."""
