"""Tests of gta_edge."""

import os

# The models here are tiny, and threads that wait for each other cost more than they compute. Set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
