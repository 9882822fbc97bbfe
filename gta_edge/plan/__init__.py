"""Cost model: bytes, FLOPs, memory, and the time that the roofline allows."""
