"""What a bundle's backends answer, and how fast: verification, perplexity, benchmarks."""
