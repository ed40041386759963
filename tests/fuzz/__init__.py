"""Property-based fuzzing: every operator, public function and module against formulas in float64 that are written down here again."""
