"""The pretraining experiments: `python -m bench.pretraining calibrate | run | status`."""
