"""``hbert eval``: held-out loss and accuracy of any masked-LM checkpoint, per source of text."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbert.data.corpus import Corpus, load_corpus
from hbert.data.storage import write_json
from hbert.data.terminal import output_console, print_table, progress
from hbert.data.token_cache import TokenCache
from hbert.errors import HbertError
from hbert.precision import add_precision_arguments, device_of, prepared

from .run_folder import RunInfo, model_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from .held_out import EvalResult, SourceResult

DEFAULT_CORPUS, DEFAULT_LENGTH = "pypi", 128


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("eval", help=summary, description=summary)
    parser.add_argument(
        "model", metavar="MODEL", help="a run or one of its checkpoints, another checkpoint folder, or a hub name"
    )
    group = parser.add_argument_group("text", f"default: the run's own, else the recipe {DEFAULT_CORPUS}")
    text = group.add_mutually_exclusive_group()
    text.add_argument("--recipe-corpus", metavar="NAME", help="a recipe or source (hbert corpus --list)")
    text.add_argument("--data", nargs="+", metavar="PATH", help="text files, as in hbert corpus --text")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="folder, tokenizer.json or vocab.txt, as uncased (default: the model's own)"
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help=f"tokens of a block (default: the run's, else {DEFAULT_LENGTH})"
    )
    parser.add_argument("--rate", type=float, default=0.15, metavar="P", help="share to mask (default 0.15)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="blocks at once (default 16)")
    parser.add_argument("--max-blocks", type=int, metavar="N", help="take an even sample of so many blocks")
    add_precision_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    parser.add_argument("--overwrite", action="store_true", help="replace the FILE of --json")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from hbert_kernels.memory import keep_heap

    from .held_out import check_arguments

    given = args.model
    args.model, info = model_folder(given)
    if args.length is None:
        args.length = DEFAULT_LENGTH if info is None else info.length
    check_arguments(args.length, args.rate, args.batch_size, args.max_blocks)
    _check_target(args.json, args.overwrite)
    if args.model != given:
        line = f"{given} has not ended: its newest checkpoint, {args.model}"
        output_console().print(line, markup=False, soft_wrap=True)
    keep_heap()
    _quiet_transformers()
    model, tokenizer = _load(args)
    cache = TokenCache.build(_corpus(args, info), tokenizer)
    model, autocast, numbers = prepared(model, args)
    result = _evaluate(args, model, cache, autocast)
    _print_result(result)
    output_console().print(_about(args, cache, numbers, info), markup=False)
    if args.json:
        _write_result(args, cache, numbers, result)


def _check_target(path: str | None, overwrite: bool) -> None:
    if path is None:
        return
    if Path(path).is_file() and not overwrite:
        raise HbertError(f"{path} exists; choose another name or pass --overwrite")
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise HbertError(f"cannot write {path}: it must be a file in a folder that exists and can be written to")


def _write_result(args: argparse.Namespace, cache: TokenCache, numbers: str, result: EvalResult) -> None:
    about = {name: getattr(args, name) for name in ("model", "length", "rate", "max_blocks")}
    about |= {"dtype": numbers, "corpus_fingerprint": cache.meta["corpus"]}
    about |= {"tokenizer_sha256": cache.meta["tokenizer_sha256"], "vocab_size": cache.vocab_size}
    write_json(Path(args.json), about | {"bits": result.bits} | asdict(result))


def _quiet_transformers() -> None:
    """What loading reports as a warning is an error here, raised with a message of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load(args: argparse.Namespace) -> tuple[PreTrainedModel, Tokenizer]:
    from hbert.data.tokenizer import load_tokenizer

    from .checkpoint import checkpoint_tokenizer, load_masked_lm
    from .held_out import check_model

    model = load_masked_lm(args.model, device_of(args))
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else checkpoint_tokenizer(args.model)
    check_model(model, tokenizer.get_vocab_size(), args.length)
    return model, tokenizer


def _corpus(args: argparse.Namespace, info: RunInfo | None) -> Corpus:
    if args.recipe_corpus or args.data:
        return load_corpus([args.recipe_corpus] if args.recipe_corpus else [], text=args.data or ())
    if info is None:
        return load_corpus(DEFAULT_CORPUS)
    corpus = info.load_corpus()
    if corpus.fingerprint != info.corpus:
        raise HbertError(
            f"the text of {args.model} is no longer the one it was trained with; to evaluate on the text as it is now, "
            "give it with --data or --recipe-corpus"
        )
    return corpus


def _evaluate(args: argparse.Namespace, model: PreTrainedModel, cache: TokenCache, dtype: str) -> EvalResult:
    from .held_out import count_blocks, evaluate

    total = count_blocks(cache, args.length)
    with progress("evaluate", min(total, args.max_blocks or total)) as advance:
        return evaluate(
            model,
            cache,
            args.length,
            rate=args.rate,
            batch_size=args.batch_size,
            max_blocks=args.max_blocks,
            dtype=dtype,
            advance=advance,
        )


def _print_result(result: EvalResult) -> None:
    rows = [_cells(name, found) for name, found in result.per_source.items()]
    if len(rows) > 1:
        rows.append(_cells("total", result))
    print_table(["source", "loss, nats", "bits", "accuracy", "at [MASK]", "masked tokens"], rows)


def _cells(name: str, result: SourceResult) -> list[str]:
    at_mask = "-" if result.mask_accuracy is None else f"{result.mask_accuracy:.4f}"
    numbers = [f"{value:.4f}" for value in (result.loss, result.bits, result.accuracy)]
    return [name, *numbers, at_mask, f"{result.num_masked:,}"]


def _about(args: argparse.Namespace, cache: TokenCache, numbers: str, info: RunInfo | None) -> str:
    digest = cache.meta["tokenizer_sha256"]
    line = (
        f"blocks of {args.length} tokens, {args.rate:g} of them masked, {numbers}; tokenizer {digest[:12]} with "
        f"{cache.vocab_size:,} pieces"
    )
    if info is not None and info.tokenizer == digest:
        return line
    return (
        f"{line}\nThis is not the tokenizer of a run of hbert pretrain: figures are comparable between models with "
        "this tokenizer only, not across vocabularies."
    )
