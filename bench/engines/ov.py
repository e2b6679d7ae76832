"""OpenVINO on the CPU: the precision of a peer's name as hint; int8 with both hints and two ways of quantizing."""

from __future__ import annotations

from functools import partial
from typing import Any

import openvino

from bench.engines.engine import Forward, Graphs, Variants

_HINTS = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("f32", "bf16")}
_TYPES = {"f32": openvino.Type.f32, "bf16": openvino.Type.bf16}


def variants(peer: str, graphs: Graphs, cpus: list[int]) -> Variants:
    """A compiled model for each graph and each hint that this processor follows.

    Raises:
        RuntimeError: OpenVINO computes in another precision here.
    """
    wanted = _HINTS[peer.rpartition("-")[2]]
    hints = [hint for hint in wanted if _followed(hint)]
    if not hints:
        raise RuntimeError(f"OpenVINO has no {' or '.join(wanted)} on this processor: it would compute in another one")
    return {
        f"{name}, hint {hint}": partial(_Model, path, hint, len(cpus))
        for name, path in graphs.items()
        for hint in hints
    }


def _followed(hint: str) -> bool:
    """Whether a model with the hint computes in it: where the processor has no such products, it is f32 silently."""
    number = openvino.opset13.parameter([1], openvino.Type.f32)
    tiny = openvino.Model([openvino.opset13.relu(number)], [number])
    compiled = openvino.Core().compile_model(tiny, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return compiled.get_property("INFERENCE_PRECISION_HINT") == _TYPES[hint]


class _Model:
    """A model that is compiled for the shape of each batch: a static shape is OpenVINO's best case."""

    def __init__(self, path: str, hint: str, threads: int) -> None:
        self._core = openvino.Core()
        self._path = path
        self._properties = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": True,
        }

    def prepared(self, ids: Any, mask: Any) -> Forward:
        model = self._core.read_model(self._path)
        model.reshape({port: list(ids.shape) for port in model.inputs})
        compiled = self._core.compile_model(model, "CPU", self._properties)
        request, feed = compiled.create_infer_request(), [ids, mask]
        return lambda: request.infer(feed)[0]
