"""What the commands of this package have in common."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from hbert_kernels.memory import keep_heap


def prepare_process() -> None:
    """Keeps the heap, and silences transformers: what it would warn of is an error or a message of ours."""
    keep_heap()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def add_text_arguments(group: Any) -> None:
    """Adds the flags that say where the text stands."""
    group.add_argument("--text-column", default="text", metavar="C", help="default: text")
    group.add_argument("--text-pair-column", metavar="C", help="the second of two texts")
    group.add_argument(
        "--columns", nargs="+", metavar="C", help="names for the columns of CSV and TSV files without a header"
    )
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens to truncate to (default: what tokenizer and model take)"
    )
