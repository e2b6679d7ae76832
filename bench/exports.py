"""Models for runtimes beside torch, from the same weights as everybody's: exported, optimized and quantized files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.cpu import Cpu
from bench.engines import family
from bench.forward_gate import expected
from bench.harness import Case
from bench.names import fixed_dtype
from bench.peers import POSITIONS, batches, source
from bench.runtime import SEED

_OPSET = 18
_NAMES = ["input_ids", "attention_mask"]
_CALIBRATION = 16  # sequences of random tokens, for activations quantized with fixed ranges
_CALIBRATION_TOKENS = 128

Paths = dict[str, str]


class _Encoder(nn.Module):
    """Tensors by position in, the last hidden state out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Exporter:
    """Answers the coordinator's requests; each file is made once and stays in the run's folder."""

    def expected(self, case: dict[str, Any], dtype: str, folder: str) -> dict[str, Any]:
        """Inputs, right rows and largest error allowed of a case for peers of `dtype`: the path of an npz file."""
        path = Path(folder) / f"{case['suite']}-{case['name'].replace('/', '-')}-{dtype}.npz"
        if not path.exists():
            _write_expected(Case(**case), dtype, path)
        return {"path": str(path)}

    def graphs(self, peer: str, case: dict[str, Any], folder: str) -> dict[str, Any]:
        """The files of a peer's variants, by name."""
        size, positions = case["params"]["size"], max(POSITIONS, case["seq"])
        made = Path(folder) / f"{Path(size).name}-{positions}"
        made.mkdir(exist_ok=True)
        torch.set_grad_enabled(False)
        return {"paths": _MAKERS[family(peer)](made, peer, lambda: source("hf", "encoder", size, positions).eval())}


def _write_expected(case: Case, dtype: str, path: Path) -> None:
    model = source("hf", "encoder", case.params["size"], case.seq).eval()
    made = batches(case.batch, case.seq, Cpu(), case.params, model.config.vocab_size, together=False)
    right, allowed = expected(model, made, dtype, ours=False)
    arrays = {
        f"{short}{i}": inputs[name].numpy()
        for i, inputs in enumerate(made)
        for short, name in (("ids", _NAMES[0]), ("mask", _NAMES[1]))
    }
    np.savez(path, right=right.numpy(), allowed=allowed, **arrays)


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is not there; what is left of a failed attempt is not taken for it."""
    marker = path.with_name(f"{path.name}.complete")
    if not marker.exists():
        make(path)
        marker.touch()
    return path


def _example() -> tuple[Tensor, Tensor]:
    ids = torch.full((2, 16), 7)
    return ids, torch.ones_like(ids)


def _onnx_graphs(folder: Path, peer: str, load: Callable[[], Any]) -> Paths:
    """As exported, and as ONNX Runtime's transformer optimizer makes it, which fuses what eager attention exports."""
    exported = _once(folder / "exported.onnx", lambda path: _export_onnx(load(), path))
    optimized = _once(folder / "optimized.onnx", lambda path: _optimize_onnx(exported, load().config, path))
    graphs = {"exported": exported, "optimized": optimized}
    if fixed_dtype(peer) == "int8":
        graphs = {
            name: _once(folder / f"{name}-int8.onnx", lambda made, path=path: _quantize_onnx(path, made))
            for name, path in graphs.items()
        }
    return {name: str(path) for name, path in graphs.items()}


def _export_onnx(model: Any, path: Path) -> None:
    model.set_attn_implementation("eager")
    outputs = ["last_hidden_state"]
    free = {name: {0: "batch", 1: "length"} for name in (*_NAMES, *outputs)}
    # The exporter by tracing: what it makes of attention is what the transformer optimizer knows how to fuse.
    torch.onnx.export(
        _Encoder(model),
        _example(),
        str(path),
        input_names=_NAMES,
        output_names=outputs,
        dynamic_axes=free,
        opset_version=_OPSET,
        dynamo=False,
    )


def _optimize_onnx(exported: Path, config: Any, path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    heads, width = config.num_attention_heads, config.hidden_size
    optimize_model(
        str(exported), model_type="bert", num_heads=heads, hidden_size=width, opt_level=1
    ).save_model_to_file(str(path))


def _quantize_onnx(floats: Path, path: Path) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The type stands for that of results of fused operators, which onnx's shape inference does not know.
    extra = {"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT}
    # With one scale for all channels, or with 7 bits (reduce_range), a trained model comes out far less accurate.
    quantize_dynamic(str(floats), str(path), weight_type=QuantType.QInt8, per_channel=True, extra_options=extra)


def _openvino_graphs(folder: Path, peer: str, load: Callable[[], Any]) -> Paths:
    """As converted; int8 with ranges of the activations from calibration (nncf), and with ranges taken in the call."""
    floats = _once(folder / "openvino.xml", lambda path: _convert_openvino(load(), path))
    if fixed_dtype(peer) != "int8":
        return {"converted": str(floats)}
    vocab = load().config.vocab_size
    calibrated = _once(folder / "calibrated.xml", lambda path: _quantize_openvino(floats, vocab, path))
    dynamic = _once(folder / "dynamic.xml", lambda path: _compress_openvino(floats, path))
    return {"calibrated": str(calibrated), "dynamic": str(dynamic)}


def _convert_openvino(model: Any, path: Path) -> None:
    import openvino

    free = openvino.PartialShape([-1, -1])
    converted = openvino.convert_model(_Encoder(model), example_input=_example(), input=[free, free])
    openvino.save_model(converted, str(path), compress_to_fp16=False)


def _quantize_openvino(floats: Path, vocab: int, path: Path) -> None:
    import nncf
    import openvino

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, vocab, (_CALIBRATION, 1, _CALIBRATION_TOKENS), generator=generator).numpy()
    samples = nncf.Dataset(list(ids), lambda one: dict(zip(_NAMES, (one, np.ones_like(one)), strict=True)))
    quantized = nncf.quantize(
        openvino.Core().read_model(str(floats)),
        samples,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=_CALIBRATION,
    )
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


def _compress_openvino(floats: Path, path: Path) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(str(floats))
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(compressed, str(path), compress_to_fp16=False)


def _ctranslate2_graphs(folder: Path, peer: str, load: Callable[[], Any]) -> Paths:
    made = _once(folder / "ctranslate2", lambda path: _convert_ctranslate2(load(), path))
    return {"converted": str(made)}


def _convert_ctranslate2(model: Any, path: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from transformers import BertModel, BertTokenizerFast

    if model.config.model_type != "bert":
        raise ValueError(f"the converter is told of BERT only, not of {model.config.model_type}")
    # The converter wants a checkpoint: with a pooler, with a vocabulary, and with a field that transformers 5 dropped.
    whole = BertModel(model.config)
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.config.position_embedding_type = "absolute"
    checkpoint = path.with_name("checkpoint")
    whole.save_pretrained(checkpoint)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(model.config.vocab_size - 5))]
    vocabulary = checkpoint / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(vocabulary)).save_pretrained(checkpoint)
    TransformersConverter(str(checkpoint)).convert(str(path), quantization="int8", force=True)
    shutil.rmtree(checkpoint)


_MAKERS = {"ort": _onnx_graphs, "ov": _openvino_graphs, "ct2": _ctranslate2_graphs}
