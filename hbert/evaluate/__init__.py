"""Held-out evaluation of masked language models, and reports of training runs."""
