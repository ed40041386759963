"""Mutation testing: the library with one mistake at a time, and whether a test that reaches it fails."""
