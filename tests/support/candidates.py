"""Every configuration that tuning may choose gives the result of the heuristic's."""

from collections.abc import Callable

import pytest
from torch import Tensor

from fastseg.kernels.runtime import config


def check_candidates(kernel: str, run: Callable[[], list[Tensor]], close: Callable[[Tensor, Tensor], None]) -> None:
    """``run`` with each candidate of ``kernel`` against ``run`` with its heuristic; ``close`` asserts on each pair."""
    asked: dict[str, tuple[int, dict]] = {}
    with config.observe_selects(lambda name, size, key: asked.setdefault(name, (size, key))):
        want = run()
    if kernel not in asked:
        pytest.skip(f"this shape runs without {kernel}")
    size, key = asked[kernel]
    for values in config.candidates_of(kernel, size, **key):
        with config.override(kernel, **values):
            try:
                got = run()
            except Exception as error:  # more shared memory or registers than the chip has: tuning leaves it out
                if "out of resource" not in str(error):
                    raise
                continue
        for g, w in zip(got, want, strict=True):
            close(g, w)
