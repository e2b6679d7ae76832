"""What git says of a checkout of the sources; needs nothing but git."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

GIT_ERRORS = (OSError, subprocess.SubprocessError)
# Tables of the pages come from results: writing them changes nothing of what is run.
_SOURCES = (".", ":(exclude)docs", ":(exclude)README.md")


def git(folder: Path, *arguments: str) -> str:
    """What a git command prints in a folder.

    Raises:
        GIT_ERRORS: git is not there, or fails, as outside a checkout.
    """
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def git_revision(checkout: Path) -> str | None:
    """Short commit hash, with "-dirty" where files that are no pages have changed; None outside a checkout."""
    try:
        dirty = git(checkout, "status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)
        return git(checkout, "rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except GIT_ERRORS:
        return None


def measured_revision(package: Path, checkout: Path) -> str:
    """The revision of the `hbert_kernels` in a folder: the checkout's, or what an installed one was built from.

    "unknown" where git does not tell. Kernels in the checkout that were compiled before csrc changed are named behind
    it.
    """
    info = _build_info(package)
    built = info.get("git", "")
    if package.parent.resolve() != checkout.resolve():
        return f"{built or 'unknown'} (installed)"
    here = git_revision(checkout) or "unknown"
    return here + (f" (kernels: {built})" if info.get("built") and _is_stale(built, checkout) else "")


def _build_info(package: Path) -> dict[str, Any]:
    try:
        return json.loads((package / "build_info.json").read_text())
    except OSError:
        return {}


def _is_stale(revision: str, checkout: Path) -> bool:
    """Whether the sources of the kernels are others than at a revision, or it is not known here."""
    try:
        return bool(git(checkout, "diff", "--name-only", revision, "--", "csrc", "setup.py"))
    except GIT_ERRORS:
        return True
