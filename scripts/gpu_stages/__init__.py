"""The GPU campaign: its stages as data (``catalogue.py``), who runs them, and what they do."""
