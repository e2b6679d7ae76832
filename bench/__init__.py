"""The benchmark of hbert: `python bench/run.py` (docs/benchmarking.md has the protocol)."""
