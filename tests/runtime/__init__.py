"""Tests of gta_edge.runtime."""
