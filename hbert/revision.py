"""What git says of a checkout of the sources; needs nothing but git."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
