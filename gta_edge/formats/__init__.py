"""Files on disk that come with a model: what they say, checked before anything relies on it."""
