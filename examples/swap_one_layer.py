"""Puts additive attention into one layer of a torch model in place of nn.MultiheadAttention, and compares.

The model is nn.TransformerEncoder on a small task with padding: which half of the vocabulary do most words of a text
come from? Prints, for the model as it is and with additive attention in layer 0, the time of a training step and the
loss before and after.

    python examples/swap_one_layer.py --length 512
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbert_kernels.nn import AdditiveAttention

VOCAB = 64


class AdditiveSelfAttention(AdditiveAttention):
    """AdditiveAttention, called as torch's encoder layers call nn.MultiheadAttention."""

    batch_first = True

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """[B, N, H] -> [B, N, H], and no weights."""
        if key is not query or value is not query or attn_mask is not None or is_causal or need_weights:
            raise ValueError("additive attention is self-attention without attn_mask, and gives no weights")
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            key_padding_mask = key_padding_mask < 0  # torch's layers turn True into -inf
        return super().forward(query, key_padding_mask), None


class Classifier(nn.Module):
    """Embeddings, nn.TransformerEncoder, and a decision on the mean of the tokens."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decide = nn.Linear(width, 2)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        """Ids and padding (True) [B, N] -> logits [B, 2]."""
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return self.decide((hidden * kept).sum(1) / kept.sum(1))


def draw_batch(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, padding and labels: which half of the vocabulary has more tokens."""
    bias = torch.rand(batch, 1)
    upper = torch.rand(batch, length) < bias
    ids = torch.randint(VOCAB // 2, (batch, length)) + upper * (VOCAB // 2)
    padding = torch.arange(length) >= torch.randint(length // 4, length + 1, (batch, 1))
    votes = (ids >= VOCAB // 2).float().masked_fill(padding, 0.5).mean(1)
    return ids, padding, (votes > 0.5).long()


class Run:
    """A model in training, the time of its steps and their losses."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, ids: Tensor, padding: Tensor, labels: Tensor) -> None:
        """One step on a batch."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(ids, padding), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def __str__(self) -> str:
        last = statistics.mean(self.losses[-max(1, len(self.losses) // 10) :])
        return f"{1e3 * statistics.median(self.seconds):7.1f} ms a step   loss {self.losses[0]:.3f} -> {last:.3f}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest text (default 128)")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step (default 8)")
    parser.add_argument("--width", type=int, default=128, help="of the model; a multiple of 32 (default 128)")
    parser.add_argument("--layers", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=40, help="default 40")
    args = parser.parse_args()
    # In evaluation torch's layers would take a short cut that reads the weights of nn.MultiheadAttention.
    torch.backends.mha.set_fastpath_enabled(False)

    heads, runs = args.width // 32, {}
    for name in ("nn.MultiheadAttention", "AdditiveAttention"):
        torch.manual_seed(0)
        model = Classifier(args.width, heads, args.layers)
        if name == "AdditiveAttention":
            model.encoder.layers[0].self_attn = AdditiveSelfAttention(args.width, heads)
        runs[name] = Run(model)
    for _ in range(args.steps):
        batch = draw_batch(args.batch, args.length)
        for run in runs.values():  # in turns: other load on the machine then meets both
            run.step(*batch)
    for name, run in runs.items():
        print(f"layer 0: {name:<21}  {run}")


if __name__ == "__main__":
    main()
