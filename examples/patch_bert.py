"""Patches a BERT, compares its outputs with those before, and times both.

The model has random weights, or those of a checkpoint folder of BERT, RoBERTa or DistilBERT. The batch is padded, as
batches of texts are: that is where running without padding gains most. At the end the patch is undone.

    python examples/patch_bert.py --layers 12 --width 768
    python examples/patch_bert.py --model path/of/a/bert --batch 16 --length 256
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel
from transformers.utils import logging

import hbert
from hbert_kernels import keep_heap


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The checkpoint's encoder, or a BERT with random weights."""
    if args.model:
        return AutoModel.from_pretrained(args.model).eval()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def draw_batch(model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, N] with padding on the right: one text is full, the others have any length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
    return ids.masked_fill(mask == 0, model.config.pad_token_id), mask


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each call. They take turns, so that other load on the machine meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder (default: random weights)")
    parser.add_argument("--layers", type=int, default=4, help="of random weights (default 4)")
    parser.add_argument("--width", type=int, default=256, help="of random weights; a multiple of 64 (default 256)")
    parser.add_argument("--batch", type=int, default=8, help="texts (default 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest text (default 128)")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each (default 10)")
    args = parser.parse_args()
    logging.set_verbosity_error()  # it would list the weights of heads, which are not used here
    keep_heap()  # for both: the pages of large activations are not given back between calls

    plain, patched = load(args), load(args)
    ids, mask = draw_batch(plain, args.batch, args.length)
    print(f"{args.batch} texts of up to {args.length} tokens, {mask.float().mean():.0%} of the batch is no padding")
    print(hbert.patch(patched))

    before = plain(ids, attention_mask=mask).last_hidden_state
    after = patched(ids, attention_mask=mask).last_hidden_state
    difference = (before - after)[mask == 1].abs().max() / before.abs().max()
    print(f"largest difference at tokens that are no padding: {difference:.1e} of the largest value")

    times = milliseconds(
        {"before": lambda: plain(ids, attention_mask=mask), "after": lambda: patched(ids, attention_mask=mask)},
        args.rounds,
    )
    ratio = times["before"] / times["after"]
    print(f"before {times['before']:.1f} ms, after {times['after']:.1f} ms: {ratio:.2f} times as fast")

    hbert.unpatch(patched)
    same = torch.equal(patched(ids, attention_mask=mask).last_hidden_state, before)
    print(f"unpatched: {'the same bits as before' if same else 'NOT what it was before'}")


if __name__ == "__main__":
    main()
