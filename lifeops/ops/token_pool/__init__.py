"""Pooling of the patch tokens of a sequence; prefix tokens bypass it."""
