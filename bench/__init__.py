"""Benchmarks: `python -m bench`, and the same problems as a pytest-benchmark suite (`pytest bench --benchmark-only`)."""
