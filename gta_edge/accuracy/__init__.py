"""How near a backend's logits must be to the reference, and the reference itself."""
