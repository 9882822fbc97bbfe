"""Scripts that measure; what several of them need stands in modules beside them."""
