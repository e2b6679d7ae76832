"""A small text, a small run, and processes that run the command and can be made to die at a chosen moment."""

import functools
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven small boats sail under bridges of stone and "
    "nobody knows whether winter will bring snow or only rain to valley where old farmers sing"
).split()

# 12 steps with dropout; lines, checkpoints and evaluations at different steps.
SMALL = {
    "size": "2x32x2",
    "vocab_size": 150,
    "block_size": 32,
    "batch_size": 4,
    "lr": 0.002,
    "max_steps": 12,
    "eval_blocks": 4,
    "log_every": 2,
    "eval_every": 5,
    "save_every": 3,
    "dropout": 0.1,
    "dtype": "fp32",
}


def write_corpus(path, documents=300, seed=0):
    """Writes documents of random sentences."""
    rng = random.Random(seed)
    texts = ["\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(4)) for _ in range(documents)]
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def write_cycles(path, documents=300, seed=0):
    """Writes documents of the words in always the same order, of any start and end: the neighbours tell a word."""
    rng = random.Random(seed)
    bounds = [(rng.randrange(len(WORDS)), rng.randrange(70, 120)) for _ in range(documents)]
    path.write_text("\n\n".join(" ".join((WORDS * 5)[start:][:length]) for start, length in bounds))
    return path


def flags(**options):
    """The options as command-line words."""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return words


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def record(out):
    return json.loads((out / "run.json").read_text())


def files_of(folder):
    """Every file below a folder with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Process:
    """`hbert pretrain` in a process of its own, its output in a file.

    `die_at` is (module, attribute, n, signal): the process sends itself this signal in the n-th call of that function.
    `before` is called before the command.
    """

    def __init__(self, words, log, environment=None, die_at=None, before=None):
        self._log = log
        context = multiprocessing.get_context("forkserver")
        # Imported once for all processes; they are forked from a server that has computed nothing.
        context.set_forkserver_preload(["hbert.pretrain.command", "torch.utils.tensorboard"])
        arguments = (["pretrain", *words], str(log), environment or {}, die_at, before)
        self._process = context.Process(target=_main, args=arguments)
        self._process.start()

    def wait(self):
        """Returns (exit status or -signal, everything it printed)."""
        self._process.join(120)
        assert self._process.exitcode is not None, self._log.read_text()
        return self._process.exitcode, self._log.read_text()


def run_process(words, log, **options):
    return Process(words, log, **options).wait()


def _main(words, log, environment, die_at, before):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    if die_at is not None:
        _arm(*die_at)
    if before is not None:
        before()
    from hbert.cli import main

    sys.exit(main(words))


def _arm(module, attribute, count, number):
    *path, name = attribute.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def fatal(*args, **options):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, name, fatal)
