"""The compiled library and the schemas in Python belong together."""

import hashlib

import torch

import hbert_kernels._program  # noqa: F401  (defines ops, too)
from hbert_kernels import _library

# Of all schemas, by the number in _library.py and csrc/abi.h. Where this fails, both files need a new number,
# and this one its digest.
DIGESTS = {b"hbert_abi 1": "650d4e1d1f0ec8f8"}


def test_another_schema_has_another_number():
    ops = torch.ops.hbert_kernels
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hbert_kernels::"))
    schemas = [str(getattr(ops, name.partition("::")[2]).default._schema) for name in names]
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()
    assert {_library._ABI: digest[:16]} == DIGESTS


def test_a_library_of_other_sources_is_not_loaded(tmp_path):
    stale = tmp_path / "_cpu.so"
    stale.write_bytes(b"\x7fELF hbert_abi 10\0")
    assert _library._load(stale, {}).startswith("_cpu.so is built from other sources (fix: pip install")
