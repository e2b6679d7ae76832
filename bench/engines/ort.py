"""ONNX Runtime: sessions on the graph as exported or as its transformer optimizer makes it, with and without arena."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import onnxruntime

from bench import machine
from bench.engines.engine import Forward, Graphs, Variants


def variants(peer: str, graphs: Graphs, cpus: list[int]) -> Variants:
    """A session for each graph, with the memory arena and without."""
    return {
        f"{name}, {'arena' if arena else 'no arena'}": partial(_Session, path, cpus, arena)
        for (name, path), arena in product(graphs.items(), (True, False))
    }


class _Session:
    """One session: the calling thread is one of its threads, and each of the others is bound to a core of its own."""

    def __init__(self, path: str, cpus: list[int], arena: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = len(cpus), 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.enable_cpu_mem_arena = arena
        options.log_severity_level = 3
        machine.confine(cpus[:1])
        if len(cpus) > 1:  # processors are counted from 1; the calling thread has no entry
            bound = ";".join(str(cpu + 1) for cpu in cpus[1:])
            options.add_session_config_entry("session.intra_op_thread_affinities", bound)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepared(self, ids: Any, mask: Any) -> Forward:
        feed = {"input_ids": ids, "attention_mask": mask}
        return lambda: self._session.run(None, feed)[0]
