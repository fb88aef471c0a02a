"""Time, memory and error of the package beside its peers: `python -m benchmarks --help`."""
