"""The command line."""

from lifeops.cli.main import main

__all__ = ["main"]
