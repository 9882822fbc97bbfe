"""Files on disk: what lies in them, and whether it is what was written."""
