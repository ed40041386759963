"""Mutants that no test can tell from the library, and why: by the key that places.Mutant has."""

EQUIVALENT: dict[str, str] = {}
