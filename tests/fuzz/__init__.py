"""Structured damage to what is read from outside: every case succeeds, or ends in one clear line."""
