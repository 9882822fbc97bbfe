"""The ops of our own: what they mean, and their implementations."""
