"""Files on disk: what lies in them, and whether it is what was written."""

import numpy  # noqa: F401  before ml_dtypes, which prints a traceback where numpy cannot be loaded
