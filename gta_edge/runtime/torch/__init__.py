"""The backend ``torch``."""
