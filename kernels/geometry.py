"""Numbers of host and kernels alike; no Triton here, so that plain-PyTorch paths read them too."""

MOST_TAPS = 256  # of a pooling window with compact indices: what a code of 8 bits can tell apart


def source_scale(low: int, full: int, align_corners: bool, factor: float | None = None) -> float:
    """Input elements per output element of one axis of a bilinear interpolation, from ``low`` to ``full`` elements.

    A given factor counts, not the quotient of the sizes; but an axis that keeps its size is copied, whatever the factor
    (torch's rule on a CPU; on CUDA it copies where both axes keep their sizes). 0 or None: none was given.
    """
    if low == full:
        return 1.0
    if align_corners:
        return (low - 1) / (full - 1) if full > 1 else 0.0
    return 1.0 / factor if factor is not None and factor > 0 else low / full
