"""Tests of gta_edge.plugins."""
