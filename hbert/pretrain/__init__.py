"""Masked-LM pretraining under a budget of time: the engine behind ``hbert pretrain``."""
