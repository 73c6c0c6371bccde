"""Rows checked, measured once, and memory-mapped; their lengths in tokens."""
