"""The lengths of the sequences in a padded batch."""

from __future__ import annotations

FILL = 0.4  # their mean over the longest


def spread_lengths(batch: int, seq: int) -> list[int]:
    """`batch` lengths, evenly spread around the mean fill, the first one full."""
    others = max(1, batch - 1)
    mean = (FILL * batch - 1) / others
    spread = [2 * mean * (i + 0.5) / others for i in range(others)]
    return [seq, *(max(1, round(share * seq)) for share in spread)][:batch]
