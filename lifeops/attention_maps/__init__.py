"""Attention roll-out of whole models: how a model is read, its layers recomputed and compared, and multiplied up."""
