"""Speed of each script's hot part against a bug-fixed baseline: python -m benchmarks --help."""
