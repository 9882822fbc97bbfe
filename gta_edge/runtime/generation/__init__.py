"""Session to tokens: the loop, sampling, stop conditions, incremental detokenization."""
