"""What patching replaced in a model and what it did not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PatchReport:
    """The outcome of :func:`hbert.patch`; its ``str`` is for people.

    Attributes:
        replaced: what -> how many of it.
        kept: what stays as it is -> why.
    """

    replaced: Counter[str] = field(default_factory=Counter)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [f"replaced  {count} {what}" for what, count in self.replaced.items()]
        return "\n".join(rows + [f"kept      {what}: {why}" for what, why in self.kept.items()])
