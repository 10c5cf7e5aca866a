"""Each script's hot part beside the plain way: python -m benchmarks --help."""
