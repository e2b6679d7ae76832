"""The ``hbert`` command.

Each subcommand is a module with ``add_parser(subparsers, summary)`` and ``run(args)``; only the module of the
subcommand that was asked for is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from ._version import __version__
from .errors import HbertError

COMMANDS = {
    "corpus": ("hbert.data.corpus_command", "list, fetch and measure text for pretraining"),
    "tokenizer": ("hbert.data.tokenizer_command", "train or take a WordPiece tokenizer"),
    "convert": ("hbert.convert.command", "turn a BERT, RoBERTa, XLM-R, DistilBERT or HBERT checkpoint into HBERT"),
    "pretrain": ("hbert.pretrain.command", "train a masked language model under a budget of time"),
    "finetune": ("hbert.finetune.finetune_command", "train a text classifier from a pretrained checkpoint"),
    "predict": ("hbert.finetune.predict_command", "label texts with a fine-tuned classifier"),
    "embed": ("hbert.finetune.embed_command", "turn texts into vectors"),
    "export": ("hbert.export_command", "write an HBERT checkpoint as an ONNX file"),
    "eval": ("hbert.evaluate.eval_command", "held-out loss and accuracy of any masked-LM checkpoint"),
    "report": ("hbert.evaluate.report_command", "draw and tabulate training runs"),
}

# What `pip install hbert` alone leaves out.
EXTRA_PACKAGES = (
    *("accelerate", "datasets", "matplotlib", "numpy", "rich", "safetensors", "tensorboard", "tokenizers"),
    *("transformers", "yaml", "onnx", "onnxruntime", "onnxscript"),
)
EXIT_INTERRUPTED = 130
EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 for a user's error, 130 when interrupted.

    ``ValueError`` (the type of every check of sizes and names), ``HbertError``, and that the cache cannot be used or a
    package of the extras is missing, are printed as one line.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (HbertError, ValueError) as error:
        return _refuse(str(error))
    except OSError as error:
        from .data.storage import cache_refusal

        if (reason := cache_refusal(error)) is None:
            raise
        return _refuse(reason)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise  # a module that a package has no longer, for one
        extra = "export" if arguments[0] == "export" else "train"
        return _refuse(f"this command needs {error.name}, which is not installed: pip install 'hbert[{extra}]'")
    return 0


def _refuse(message: str) -> int:
    print(f"hbert: error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _dispatch(arguments: Sequence[str]) -> None:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="hbert", description="HybridBERT encoders: text, training and serving.")
    parser.add_argument("--version", action="version", version=f"hbert {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (module, summary) in COMMANDS.items():
        if command == name:
            import_module(module).add_parser(subparsers, summary)
        else:
            subparsers.add_parser(command, help=summary)
    args = parser.parse_args(arguments)
    import_module(COMMANDS[args.command][0]).run(args)
