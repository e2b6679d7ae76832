"""Small models, batches, and a reference encoder in NumPy that shares no code with the package."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from hbert import HBertConfig, HBertForMaskedLM, HBertModel, PackedLayout
from hbert_kernels.packing import Packing

STYLES = ("sub_ln", "pre_ln", "post_ln", "merge")
VOCAB = 61


def small_config(**fields) -> HBertConfig:
    """Odd sizes: H = 12, three heads, feed-forward 20."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 48,
        "layer_types": "AS",
    }
    return HBertConfig(**{**sizes, **fields})


def all_variants() -> list[dict]:
    """Every norm style x layer type x convolution x scorer that the configuration allows."""
    variants = []
    for style in STYLES:
        variants.append({"norm_style": style, "layer_types": "SS"})
        for scorer in ("dense", "per_head"):
            for conv in (0, 3, 5) if style in ("sub_ln", "pre_ln") else (0,):
                fields = {"norm_style": style, "layer_types": "AAS", "scorer": scorer, "conv_kernel_size": conv}
                variants.append(fields)
    return variants + [{"norm_style": "sub_ln", "layer_types": "AS", "conv_kernel_size": 3, "conv_placement": "branch"}]


def variant_name(fields: dict) -> str:
    return "-".join(str(value) for value in fields.values())


def perturb(model: torch.nn.Module, seed: int = 1) -> None:
    """Move every parameter, so that no norm is the identity and no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))


def small_model(kind=HBertModel, dtype: torch.dtype = torch.float64, **fields):
    torch.manual_seed(0)
    model = kind(small_config(**fields))
    perturb(model)
    return model.to(dtype).eval()


def small_masked_lm(**fields) -> HBertForMaskedLM:
    return small_model(HBertForMaskedLM, **fields)


def dense_twin(model):
    """The same weights behind attn_implementation="eager"."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert twin.config._attn_implementation == "eager"
    return twin


class LoraLinear(torch.nn.Module):
    """A linear layer under an adapter: its weight and bias are those of the layer below, as PEFT has it."""

    def __init__(self, base_layer: torch.nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        dtype = base_layer.weight.dtype
        self.lora_A = torch.nn.Linear(self.in_features, rank, bias=False, dtype=dtype)
        self.lora_B = torch.nn.Linear(rank, self.out_features, bias=False, dtype=dtype)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_adapter(model: torch.nn.Module, name: str) -> LoraLinear:
    """Puts an adapter around one of the linear layers of a model."""
    adapter = LoraLinear(model.get_submodule(name))
    model.set_submodule(name, adapter)
    return adapter


def batch(rows: int = 4, length: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask with holes; row 0 is full, and with more than two rows, row 1 is all padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) > 0.4
    mask[0] = True
    if rows > 2:
        mask[1] = False
    return ids, mask


def run_static(model: HBertModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The model over the static layout, which is otherwise chosen while compiling."""
    layout = PackedLayout(Packing.from_mask(mask, static=True))
    return layout.unpack(model(layout.pack(ids), layout=layout).last_hidden_state)


class NumpyEncoder:
    """HBERT for one sequence without padding, from a state dict: the formulas, with loops over heads."""

    def __init__(self, model: HBertModel):
        self.config = model.config
        self.weights = {name: t.detach().double().numpy() for name, t in model.state_dict().items()}

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        width = self.config.hidden_size
        table = np.empty((len(ids), width))
        for p in range(len(ids)):
            for c in range(width):
                angle = p / 10000 ** (2 * (c // 2) / width)
                # The table of the model is float32.
                table[p, c] = np.float32(math.sin(angle) if c % 2 == 0 else math.cos(angle))
        x = self.norm("embeddings.norm", self.weights["embeddings.word_embeddings.weight"][ids] + table)
        for index, kind in enumerate(self.config.layer_types):
            x = self.layer(f"layers.{index}", kind, x)
        return self.norm("norm", x) if self.config.norm_style in ("sub_ln", "pre_ln") else x

    def layer(self, name: str, kind: str, x: np.ndarray) -> np.ndarray:
        style = self.config.norm_style
        attend = self.additive_attention if kind == "linear_attention" else self.self_attention
        if style in ("sub_ln", "pre_ln"):
            in_branch = self.config.conv_placement == "branch"
            if in_branch:
                normed = self.norm(f"{name}.conv", x)
                x = x + self.convolved(self.weights[f"{name}.conv.conv_weight"], normed)
            normed = self.norm(f"{name}.attention_norm", x)
            if kind == "linear_attention" and self.config.conv_kernel_size and not in_branch:
                normed = self.convolved(self.weights[f"{name}.attention_norm.conv_weight"], normed)
            y = x + attend(f"{name}.attention", normed)
            return y + self.feed_forward(f"{name}.ffn", self.norm(f"{name}.ffn_norm", y))
        branch = attend(f"{name}.attention", x)
        if style == "merge":
            both = np.concatenate([x, branch], axis=-1)
            branch = self.linear(f"{name}.merge.out", self.norm(f"{name}.merge.norm", both))
        y = self.norm(f"{name}.attention_norm", x + branch)
        return self.norm(f"{name}.ffn_norm", y + self.feed_forward(f"{name}.ffn", y))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.layer_norm_eps)
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    @staticmethod
    def convolved(taps: np.ndarray, y: np.ndarray) -> np.ndarray:
        radius, out = len(taps) // 2, y.copy()
        for t in range(len(y)):
            for j in range(-radius, radius + 1):
                if 0 <= t + j < len(y):
                    out[t] += taps[j + radius] * y[t + j]
        return out

    def self_attention(self, name: str, x: np.ndarray) -> np.ndarray:
        q, k, v = np.split(self.linear(f"{name}.qkv", x), 3, axis=-1)
        out = np.empty_like(q)
        for part in self.head_slices():
            scores = q[:, part] @ k[:, part].T / math.sqrt(part.stop - part.start)
            out[:, part] = np.stack([softmax(row) for row in scores]) @ v[:, part]
        return self.linear(f"{name}.out", self.inner_norm(name, out))

    def additive_attention(self, name: str, x: np.ndarray) -> np.ndarray:
        """The equations of the official Fastformer code, with the sub-layer norm before the transform."""
        query, key = self.linear(f"{name}.query", x), self.linear(f"{name}.key", x)
        product = key * self.pooled(f"{name}.query_att", query)
        gated = query * self.pooled(f"{name}.key_att", product)
        return self.linear(f"{name}.transform", self.inner_norm(name, gated)) + query

    def pooled(self, name: str, x: np.ndarray) -> np.ndarray:
        out = np.empty(x.shape[-1])
        for head, part in enumerate(self.head_slices()):
            if self.config.scorer == "dense":
                scores = x @ self.weights[f"{name}.weight"][head] + self.weights[f"{name}.bias"][head]
            else:
                scores = x[:, part] @ self.weights[f"{name}.weight"][head]
            out[part] = softmax(scores / math.sqrt(part.stop - part.start)) @ x[:, part]
        return out

    def inner_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.norm(f"{name}.norm", x) if self.config.norm_style == "sub_ln" else x

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.fc2", self.inner_norm(name, self.activation(self.linear(f"{name}.fc1", x))))

    def activation(self, x: np.ndarray) -> np.ndarray:
        if self.config.hidden_act == "relu":
            return np.maximum(x, 0)
        if self.config.hidden_act == "gelu_tanh":
            return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def head_slices(self) -> list[slice]:
        size = self.config.hidden_size // self.config.num_attention_heads
        return [slice(start, start + size) for start in range(0, self.config.hidden_size, size)]


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()
