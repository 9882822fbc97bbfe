"""Rows of caches between two steps: copied, folded into others, their keys rotated, for all layers at once."""
