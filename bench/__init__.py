"""The benchmark of hbert: `python bench/run.py` (docs/benchmarking.md has the protocol)."""

from hbert import processor as processor  # before torch: its ALLOWED
