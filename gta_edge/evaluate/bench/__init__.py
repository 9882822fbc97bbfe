"""Backends side by side on the same bundles: who is asked, what a step must read, what was measured, who is right."""
