"""optimize() of models with adapters: refused where weights are read, called where they are not."""

from __future__ import annotations

import pytest
import torch
from model_helpers import batch, small_model, with_adapter
from patch_helpers import batch_of, small
from torch.nn.utils import prune

from hbert import HBertForTokenClassification, optimize

ADAPTED = [
    *((None, f"layers.{i}.ffn.{name}") for i in (0, 1) for name in ("fc1", "fc2")),
    *((None, f"layers.0.attention.{name}") for name in ("query", "query_att", "key", "key_att", "transform")),
    *((None, f"layers.{name}") for name in ("1.attention.qkv", "1.attention.out", "1.merge.out")),
    *((family, "encoder.layer.2.attention.self.query") for family in ("bert", "roberta", "xlm-roberta")),
    ("distilbert", "transformer.layer.0.ffn.lin1"),
]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize(("family", "name"), ADAPTED)
def test_adapters_are_refused(family, name, dtype):
    fields = {"norm_style": "merge"} if "merge" in name else {}
    model = small(family) if family else small_model(dtype=torch.float32, **fields)
    with_adapter(model, name)
    message = f"{type(model).__name__} cannot be optimized: its {name} is a LoraLinear of model_helpers, .*; merge"
    with pytest.raises(ValueError, match=rf"{message} adapters first \(merge_and_unload\(\)\)"):
        optimize(torch.nn.Sequential(model), dtype)


@pytest.mark.parametrize(
    ("family", "name"), [(None, "layers.1.ffn.fc1"), (None, "norm"), ("bert", "encoder.layer.0.output.dense")]
)
def test_parameters_that_a_hook_computes_are_refused(family, name):
    model = small(family).float() if family else small_model(dtype=torch.float32)
    prune.l1_unstructured(model.get_submodule(name), "weight", 0.3)
    with pytest.raises(ValueError, match=f"cannot be optimized: a hook computes parameters of its {name}; make them"):
        optimize(model)
    prune.remove(model.get_submodule(name), "weight")
    optimize(model)


def test_what_stands_behind_the_encoder_may_have_adapters():
    model = small_model(HBertForTokenClassification, dtype=torch.float32)
    with_adapter(model, "classifier")
    inputs = batch()
    torch.testing.assert_close(optimize(model)(*inputs).logits, model(*inputs).logits, rtol=1e-4, atol=1e-5)
    bert = small("bert").float()
    with_adapter(bert, "pooler.dense")
    inputs = batch_of(bert)
    torch.testing.assert_close(
        optimize(bert)(**inputs).pooler_output, bert(**inputs).pooler_output, rtol=1e-4, atol=1e-5
    )
