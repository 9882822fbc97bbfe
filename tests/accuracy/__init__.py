"""Tests of how near logits must be to the reference."""
