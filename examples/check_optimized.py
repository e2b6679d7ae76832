"""How near the embeddings of an optimized encoder are to those of its original, on your texts.

Look at it before an int8 model goes anywhere: how much int8 numbers cost depends on the model.

    python examples/check_optimized.py --model path/of/a/checkpoint --texts lines.txt

A text is a line of the file; without one, texts are the longer lines of this repository's documentation. Checkpoints
are those of HBERT, BERT, RoBERTa and DistilBERT. The embedding is the mean of the last hidden states.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import hbert
from hbert.finetune.encoding import encode_texts
from hbert.finetune.inference import Runner, pooled_states
from hbert.finetune.models import load_encoder, load_text_tokenizer, text_length
from hbert.finetune.options import prepare_process

DTYPES = ("fp32", "bf16", "int8")


def own_texts() -> list[str]:
    """Lines of the documentation that have ten words or more, without tables."""
    pages = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
    lines = [line.strip() for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if len(line.split()) >= 10 and not line.startswith("|")]


def embed(encoder: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Unit vectors [N, H], and how fast, on the terminal."""
    runner = Runner(encoder, tokenizer, pooled_states("mean", normalize=True))
    vectors = runner.run(encode_texts(tokenizer, texts, None, text_length(encoder, tokenizer, None, pair=False)))
    print(f"{type(encoder).__name__}: {runner.pace()}")
    return vectors


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint with its tokenizer (default: MiniLM, downloaded once)"
    )
    parser.add_argument("--texts", metavar="FILE", type=Path, help="one text a line")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be given again (default: all)")
    args = parser.parse_args()
    prepare_process()
    if args.model is None:
        import defaults
    folder = str(args.model or defaults.minilm())
    encoder: Any = load_encoder(folder).cpu()
    tokenizer = load_text_tokenizer(folder, encoder)
    texts = own_texts() if args.texts is None else args.texts.read_text(encoding="utf-8").splitlines()
    expected = embed(encoder, tokenizer, texts)
    for dtype in args.dtype or DTYPES:
        found = embed(hbert.optimize(encoder, dtype), tokenizer, texts)
        cosines = (expected * found).sum(1)
        worst = int(cosines.argmin())
        print(f"{dtype}: cosine to the original: mean {cosines.mean():.5f}, lowest {cosines[worst]:.5f}")
        print(f"  lowest for: {texts[worst][:80]}")


if __name__ == "__main__":
    main()
