"""What the Triton kernels take; asked before any of them, or Triton, is imported."""

from __future__ import annotations

MAX_WIDTH = 8192  # a row is one block of registers
MAX_RING = 5 * 4096  # values of the rows that the convolution keeps in registers
MAX_POOL_WIDTH, MAX_POOL_HEADS = 1024, 64
POOL_SHARED_BYTES = 132 << 10  # of a block, on NVIDIA: rows and scorers (tests/gpu/triton_budget.json)


def width_refusal(width: int) -> str | None:
    """Why rows of this width cannot be normalized; None if they can."""
    return None if width <= MAX_WIDTH else f"rows are at most {MAX_WIDTH} wide, got {width}"


def ring_refusal(width: int, taps: int) -> str | None:
    """Why rows of this width cannot be convolved with so many taps; None if they can."""
    if (1 << (width - 1).bit_length()) * taps <= MAX_RING:
        return None
    return f"width (as a power of two) times taps is at most {MAX_RING}, got {width} and {taps}"


def pool_refusal(width: int, num_heads: int) -> str | None:
    """Why sequences of such rows cannot be pooled; None if they can."""
    if width > MAX_POOL_WIDTH:
        return f"rows of a pool are at most {MAX_POOL_WIDTH} wide, got {width}"
    if num_heads > MAX_POOL_HEADS:
        return f"has at most {MAX_POOL_HEADS} heads, got {num_heads}"
    return None
