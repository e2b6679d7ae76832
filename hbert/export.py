"""Export to ONNX, by way of the dense layout: plain torch with a mask, no op of ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .data.storage import replacing
from .errors import HbertError
from .modeling import HBertPreTrainedModel

# Read by ONNX Runtime 1.14 and later.
_OPSET = 18
_TOLERANCE = 1e-4
_OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# (batch, length): the exporter sees the first one, the finished file is tried at all.
_SHAPES = ((2, 8), (1, 1), (3, 5))


class _Dense(nn.Module):
    """A model with tensors by position in and out, which is what ONNX has."""

    def __init__(self, model: HBertPreTrainedModel):
        super().__init__()
        self.model = copy.deepcopy(model).eval().float().cpu()
        self.model.set_attn_implementation("eager")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(*inputs).values())

    def outputs(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        found = self.model(input_ids, attention_mask, token_type_ids=token_type_ids)
        return {name: found[name] for name in _OUTPUTS if name in found}


def export_onnx(model: HBertPreTrainedModel, path: str | Path) -> Path:
    """Writes ``model`` as an ONNX file and checks it in ONNX Runtime.

    Inputs: input_ids and attention_mask int64 [batch, length], both sizes free, and token_type_ids where the
    model has them. Outputs: last_hidden_state of an encoder, logits of a head, or start_logits and end_logits,
    float32, equal to the model's to 1e-4 of their largest value (question answering: at a valid token).

    What is lost: unpadding (padding costs its full share), the fused kernels and the K-free form of additive
    attention, and packed inputs.

    Args:
        model: any HBERT model, of any dtype; it is not changed.
        path: of the file; replaced if it exists.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing.
        HbertError: the file cannot be written; or ONNX Runtime computes something else, and nothing was written.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        needed = f"export to ONNX needs {' and '.join(missing)}: pip install 'hbert[export]'"
        raise ModuleNotFoundError(needed, name=missing[0])
    path, dense = Path(path), _Dense(model)
    inputs = [_inputs(model.config, shape) for shape in _SHAPES]
    try:
        with replacing(path) as temporary:
            temporary.touch()  # where that fails, the export, which takes its time, would be in vain
            _program(dense, inputs[0]).save(str(temporary), external_data=False)
            _check(dense, temporary, inputs)
    except OSError as error:
        raise HbertError(f"{path} could not be written: {error}") from error
    return path


def _program(dense: _Dense, example: dict[str, Tensor]) -> torch.onnx.ONNXProgram:
    longest = dense.model.config.max_position_embeddings
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=longest)}
    program = torch.onnx.export(
        dense,
        tuple(example.values()),
        input_names=list(example),
        output_names=list(dense.outputs(**example)),
        dynamic_shapes=(tuple(sizes for _ in example),),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program


def _check(dense: _Dense, path: Path, batches: Sequence[dict[str, Tensor]]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in batches:
        found = session.run(None, {name: t.numpy() for name, t in batch.items()})
        with torch.no_grad():
            expected = dense.outputs(**batch)
        for (name, ours), theirs in zip(expected.items(), found, strict=True):
            error = float((torch.from_numpy(theirs) - ours).abs().max())
            # Under the mask, logits of question answering are the lowest finite number.
            largest = float(ours[ours != torch.finfo(ours.dtype).min].abs().max())
            # Not "error > ...", which a NaN would pass.
            if not error <= _TOLERANCE * largest:
                shape = tuple(batch["input_ids"].shape)
                raise HbertError(f"ONNX Runtime's {name} is off by {error:.2g} at {shape}; nothing was written")


def _inputs(config: PreTrainedConfig, shape: tuple[int, int]) -> dict[str, Tensor]:
    """A batch with right padding; ``shape`` is (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(shape[1]) < lengths).long()}
    return {**inputs, "token_type_ids": torch.zeros_like(ids)} if config.type_vocab_size else inputs
