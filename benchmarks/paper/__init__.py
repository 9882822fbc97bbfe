"""The GTA paper's claims beside what is computed and measured here: makes ``docs/paper.md``."""
