"""What a model costs: parameters, multiply-accumulates, activation memory, beside published sizes."""
