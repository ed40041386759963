"""The DW shortcut as operators of its own."""
