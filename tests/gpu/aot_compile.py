"""What Triton's compiler makes of the kernels for GPUs that are not here: registers, spills, shared memory, loads.

The ops run on tensors without memory. What they launch is recorded and compiled as the launch would have been, so
that no configuration is checked that never runs, and none that runs is copied here. A program, because it needs a
process in which triton has not been imported to interpret:

    python tests/gpu/aot_compile.py sm_90 aligned base    # JSON for test_triton_aot.py
    python tests/gpu/aot_compile.py --write [RUN ...]     # compile what the full checks do (or some of RUNS), and
                                                          # make the registers the budget; its exceptions stay
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"

import json  # noqa: E402
import linecache  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
from cuda_resources import tool  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from hbert_kernels.triton import additive_pool, conv_layer_norm, masked_lm_loss, row_norm  # noqa: E402

BUDGET = Path(__file__).with_name("triton_budget.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
VOCAB = 30522
# Loads of activations, as kernels and their helpers spell them. `row + label` is the one logit of the label.
_ACTIVATION_LOAD = re.compile(r"tl\.load\((X|DY|DTOTAL|RESIDUAL|x|row) \+ (?!label)")
_LOCATION = re.compile(r"\.loc\b.*?(\S+\.py):(\d+):")
_FILE = re.compile(r'\.file\s+\d+ (?:"([^"]*)" )?"([^"]*)"')
_LOADS = {
    "cuda": re.compile(
        r"\bld\.global[\w.:]*?(?:\.v(?P<count>\d))?\.[bfsu](?P<bits>\d+) |cp\.async\.c[ag].*?0x(?P<hex>\w+)"
    ),
    "hip": re.compile(r"\b(?:buffer|global)_load_(?P<word>dwordx?(?P<words>\d?)|[us]byte\w*|[us]?short\w*)"),
}


# What is launched.


@dataclass(frozen=True)
class Launch:
    """A call of a kernel, not carried out."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    grid: tuple[int, ...]
    options: dict[str, Any]


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Launches inside the block, by code that believes it runs on the architecture's platform."""
    launches: list[Launch] = []

    def run(kernel, *arguments, grid, warmup, **options):
        launches.append(Launch(kernel, arguments, grid, options))

    hip = "7" if TARGETS[architecture].backend == "hip" else None
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch.version, "hip", hip):
        yield launches


@dataclass(frozen=True)
class Shape:
    """Packed rows, and parameters in float32, as mixed precision has them."""

    width: int
    dtype: torch.dtype = BF16
    heads: int = 12
    tokens: int = 4096
    sequences: int = 32

    @property
    def rows(self) -> torch.Tensor:
        return empty(self.tokens, self.width, dtype=self.dtype)

    @property
    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        return empty(self.width), empty(self.width)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return empty(self.sequences + 1, dtype=torch.int32)


def empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm(s: Shape) -> None:
    """Forward and backward, as the problems below."""
    x = s.rows
    y, *statistics = row_norm.layer_norm(x, *s.affine, 1e-5)
    row_norm.layer_norm_backward(y, None, x, *statistics, *s.affine)


def add_layer_norm(s: Shape, stream: torch.dtype | None = None) -> None:
    """The residual stream has the dtype of the rows or another one."""
    residual = s.rows.to(stream or s.dtype)
    y, total, *statistics = row_norm.add_layer_norm(s.rows, residual, *s.affine, 1e-5)
    row_norm.layer_norm_backward(y, total, total, *statistics, *s.affine)


def activation_layer_norm(s: Shape, activation: int = 0) -> None:
    """The input bias is that of the linear layer before."""
    x, bias = s.rows, s.affine[0]
    y, *statistics = row_norm.activation_layer_norm(x, *s.affine, 1e-5, activation, bias)
    row_norm.activation_layer_norm_backward(y, x, *statistics, *s.affine, activation, bias)


def gated_layer_norm(s: Shape) -> None:
    x, packed = s.rows, (empty(s.sequences, s.width), s.cu_seqlens)
    y, *statistics = row_norm.gated_layer_norm(x, *packed, *s.affine, 1e-12)
    row_norm.gated_layer_norm_backward(y, x, *packed, *statistics, *s.affine)


def conv_norm(s: Shape, taps: int = 3) -> None:
    x, parameters = s.rows, (*s.affine, empty(taps, s.width), s.cu_seqlens)
    y, *statistics = conv_layer_norm.conv_layer_norm(x, *parameters, 1e-5)
    conv_layer_norm.conv_layer_norm_backward(y, x, *statistics, *parameters)


def pool(s: Shape, scorer: str = "shared", full: bool = False) -> None:
    """``scorer``: of all sequences ("shared"), of each ("own"), or of all and the slice of each head ("slice")."""
    whole = s.heads, s.width
    tables = {"shared": whole, "own": (s.sequences, *whole), "slice": (s.heads, s.width // s.heads)}
    x, table, options = s.rows, empty(*tables[scorer]), (s.heads, full, 0.125)
    pooled, softmax = additive_pool.additive_pool(x, table, s.cu_seqlens, *options)
    additive_pool.additive_pool_backward(pooled, x, table, s.cu_seqlens, pooled, softmax, *options)


def loss(
    s: Shape, masked: int = 614, weights: torch.dtype = F32, smoothing: float = 0.0, gradient: bool = True
) -> None:
    """``masked`` rows: 15% of 4096; several thousand take more than one chunk."""
    hidden, labels = empty(masked, s.width, dtype=s.dtype), empty(masked, dtype=torch.int64)
    decoder = empty(VOCAB, s.width, dtype=weights), empty(VOCAB, dtype=weights)
    masked_lm_loss.masked_lm_loss(hidden, *decoder, labels, None, -100, smoothing, [gradient] * 3)


Problem = Callable[[], None]


def _rows(s: Shape) -> list[Problem]:
    inner = Shape(min(4 * s.width, 4096), s.dtype)
    norms = [lambda op=op: op(s) for op in (layer_norm, add_layer_norm, gated_layer_norm, conv_norm)]
    return [*norms, lambda: activation_layer_norm(inner)]


def base() -> list[Problem]:
    """The base model, bfloat16 over float32 parameters."""
    s = Shape(768)
    chunks = [lambda: loss(s), lambda: loss(s, 8192, BF16)]
    return [*_rows(s), lambda: pool(s, "own", full=True), *chunks]


def common() -> list[Problem]:
    """The base model in bfloat16 and float32, both ways of its pooling, and wide rows."""
    s, double = Shape(768), Shape(768, F32)
    forms = [lambda: pool(s), lambda: pool(double, "own", full=True)]
    losses = [lambda: loss(double), lambda: loss(s, gradient=False), lambda: loss(s, smoothing=0.1)]
    others = [p for shape in (double, Shape(4096)) for p in _rows(shape)]
    return [*base(), *others, *forms, *losses]


def full() -> list[Problem]:
    """Other widths, activations, taps and scorers too, float16, and a residual stream in float32."""
    s, inner, widest = Shape(768), Shape(3072), Shape(8192)
    shapes = Shape(768, F16), *(Shape(width) for width in (64, 256, 1024))
    rest = [
        lambda: activation_layer_norm(inner, 1), lambda: activation_layer_norm(inner, 2),
        lambda: add_layer_norm(s, F32), lambda: conv_norm(s, taps=5), lambda: conv_norm(s, taps=7),
        lambda: activation_layer_norm(widest), lambda: gated_layer_norm(widest), lambda: add_layer_norm(widest),
        lambda: pool(Shape(64, heads=4), "own", full=True), lambda: pool(Shape(1024, heads=16), "own", full=True),
        lambda: pool(Shape(1024, F32, heads=64), "own", full=True), lambda: pool(Shape(768, F16)),
        lambda: pool(s, "slice"),
    ]  # fmt: skip
    return [*common(), *[p for shape in shapes for p in _rows(shape)], *rest]


PROBLEMS = {"base": base, "common": common, "full": full}
# Without alignment, of which there is little in practice, the problems are fewer.
RUNS = {f"{a} {alignment}": p for a in TARGETS for alignment, p in (("aligned", "full"), ("unaligned", "common"))}


# What it is compiled to.


@dataclass(frozen=True)
class Source:
    """A launch, specialized by its arguments as triton's launcher does it."""

    title: str  # kernel, dtypes of pointers, constants
    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]


def specialize(launch: Launch, architecture: str, aligned: bool) -> Source:
    """Not ``aligned``: neither a pointer nor an integer is known to be a multiple of 16."""
    target, kernel = TARGETS[architecture], launch.kernel
    backend, given = make_backend(target), launch.options | {"debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, _ = bind(*launch.arguments, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, arguments, specialization, None)
    if not aligned:
        attributes = {k: [a for a in v if a[0] != "tt.divisibility"] for k, v in attributes.items()}
    pointers = [f"{name}:{kind[1:]}" for name, kind in signature.items() if kind.startswith("*")]
    fixed = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr} | {"warps": options.num_warps}
    words = [kernel.__name__, *pointers, *(f"{k}={v}" for k, v in fixed.items() if v is not None)]
    source = ASTSource(kernel, signature, constants, attributes)
    return Source(" ".join(words), source, target, options.__dict__)


def sources(architecture: str, alignment: str, problems: str) -> dict[str, Source]:
    """By title: one for launches that differ in nothing but which of their integers are multiples of 16."""
    with recording(architecture) as launches:
        for problem in PROBLEMS[problems]():
            problem()
    found: dict[str, Source] = {}
    for launch in launches:
        source = specialize(launch, architecture, alignment == "aligned")
        found.setdefault(source.title, source)
    return found


def one_of_each_kernel(found: dict[str, Source]) -> dict[str, Source]:
    """The first configuration of every kernel."""
    first: dict[str, Source] = {}
    for source in found.values():
        first.setdefault(source.source.name, source)
    return {source.title: source for source in first.values()}


def resources(source: Source) -> dict[str, Any]:
    """Registers and spilled bytes of a thread, shared memory of a program, and its loads of activations."""
    compiled = triton.compile(source.source, target=source.target, options=source.options)
    cuda = source.target.backend == "cuda"
    used = _cuda_usage(compiled.asm["cubin"]) if cuda else _hip_usage(compiled.asm["amdgcn"])
    loads = activation_loads(compiled.asm["ptx" if cuda else "amdgcn"], source.target.backend)
    return used | {"shared": compiled.metadata.shared, "loads": loads}


def _cuda_usage(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups())
    return {"registers": registers, "spilled": stack + local}


def _hip_usage(text: str) -> dict[str, int]:
    """A scalar register that is spilled goes to lanes of a vector register, not to memory."""
    names = "vgpr_count", "private_segment_fixed_size"
    registers, private = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
    return {"registers": registers, "spilled": private}


def activation_loads(assembly: str, backend: str) -> dict[str, int]:
    """Bytes of the narrowest load instruction of each array of activations, by its name in the source."""
    paths = [Path(folder or "", name) for folder, name in _FILE.findall(assembly)]
    files = {path.name: str(path) for path in paths}
    found: dict[str, int] = {}
    for location, text in _located(assembly):
        if (load := _LOADS[backend].search(text)) and location:
            line = linecache.getline(files[Path(location[1]).name], int(location[2]))
            if array := _ACTIVATION_LOAD.search(line):
                found[array[1]] = min(_bytes(load), found.get(array[1], 1 << 10))
    return found


def _located(assembly: str) -> Iterator[tuple[re.Match[str] | None, str]]:
    """Lines, with their location: in inline assembly that of its first line, from which PTX counts on."""
    location, inline, known = None, False, False
    for text in assembly.splitlines():
        if "inline asm" in text:
            inline, known = "begin" in text, False
        elif (match := _LOCATION.search(text)) and not (inline and known):
            location, known = match, True
        yield location, text


def _bytes(load: re.Match[str]) -> int:
    found = load.groupdict()
    if found.get("hex"):
        return int(found["hex"], 16)
    if "bits" in found:
        return int(found["count"] or 1) * int(found["bits"]) // 8
    if found["word"].startswith("dword"):
        return 4 * int(found["words"] or 1)
    return 2 if "short" in found["word"] else 1


def measure(found: dict[str, Source], progress: bool = False) -> dict[str, dict[str, Any]]:
    """The resources of every source, by title."""
    measured = {}
    for title, source in found.items():
        measured[title] = resources(source)
        if progress:
            print(title, measured[title], file=sys.stderr, flush=True)
    return measured


# The budget.


def write(runs: list[str]) -> None:
    """Measure these runs. Kernels that they no longer compile leave the budget."""
    for run in runs:
        measured = measure(sources(*run.split(), RUNS[run]), progress=True)
        budget = json.loads(BUDGET.read_text())
        registers: dict[str, dict[str, int]] = budget["registers"]
        for title in registers.keys() | measured.keys():
            registers.setdefault(title, {}).pop(run, None)
            if title in measured:
                registers[title][run] = measured[title]["registers"]
        budget["registers"] = {title: registers[title] for title in sorted(registers) if registers[title]}
        if runs == list(RUNS):
            budget["triton"]["version"] = triton.__version__
        elif budget["triton"]["version"] != triton.__version__:
            sys.exit("the budget is of another Triton: write all runs, or install that one")
        BUDGET.write_text(_one_line_each(budget))


def _one_line_each(budget: dict[str, dict[str, Any]]) -> str:
    sections = []
    for name, entries in budget.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in entries.items())
        sections.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main(arguments: list[str]) -> None:
    if arguments[0] == "--write":
        return write(arguments[1:] or list(RUNS))
    architecture, alignment, problems = arguments
    found = sources(architecture, alignment, problems.removesuffix("-one-each"))
    if problems.endswith("-one-each"):
        found = one_of_each_kernel(found)
    json.dump(measure(found), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
