"""Configurations that the model finds better than the heuristic's by a clear margin, for ``kernels/tuned``.

Compiling each candidate costs seconds, so a few kernels are looked at, on the shapes of ``WORK``: those whose times few
programs or long waits decide, where a heuristic that counts bytes says nothing. A measured row wins over a predicted
one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.ceilings import Chip
from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.tools.cases.separable_conv import separable
from fastseg.kernels.tools.predict.model import Prediction, predict_launches
from fastseg.kernels.tools.tune import Trial, entry, write_table
from fastseg.kernels.tools.watch import Row

MARGIN = 0.85  # of the heuristic's time: what a candidate may take at most
TABLES = {"H200": "NVIDIA_H200"}  # as `config.gpu_name` names them; of others, the architecture's

_bf16 = torch.bfloat16
_decoder = {"N": 16, "C": 304, "H": 128, "W": 128, "COUT": 256}
_middle = {"N": 16, "C": 728, "H": 32, "W": 32, "COUT": 728}
_entry = {"N": 16, "C": 256, "H": 128, "W": 128, "COUT": 256}
WORK: dict[str, list[Callable[[], None]]] = {
    "batch_stats": [partial(separable, _bf16, **shape, batch_stats=True) for shape in (_decoder, _middle, _entry)],
    "separable_conv_fwd_fused": [partial(separable, _bf16, N=1, C=960, H=32, W=32, COUT=160, dilation=2)],
}


class Choice(NamedTuple):
    """The candidate of least time for one question to ``config.select``, and the heuristic's."""

    row: Row
    values: dict[str, int]
    us: float
    heuristic_us: float

    @property
    def clear(self) -> bool:
        return self.us < MARGIN * self.heuristic_us


def questions(kernel: str, fn: Callable[[], None]) -> list[Row]:
    """What ``fn`` asks ``config.select`` about ``kernel``, in order."""
    asked: list[Row] = []

    def on_select(name: str, size: int, key: dict) -> None:
        if name == kernel:
            asked.append(Row(name, size, tuple(sorted(key.items()))))

    with config.observe_selects(on_select), intercept(lambda *launch: None):
        fn()
    return asked


def choose(
    kernel: str, fn: Callable[[], None], chip: Chip, predictions: Callable[..., list[Prediction]] = predict_launches
) -> Iterator[Choice]:
    """The best candidate for each question about ``kernel`` that ``fn`` asks; a launch follows each of them."""
    asked = questions(kernel, fn)
    for row in dict.fromkeys(asked):
        trials: list[tuple[float, dict[str, int]]] = []
        for values in config.candidates_of(kernel, row.size, **dict(row.key)):
            try:
                with config.override(kernel, **values):
                    one = predictions(fn, chip, wanted=f"_{kernel}_kernel".__eq__)[asked.index(row)]
            except RuntimeError:  # the compiler refuses it: too few registers, say
                if not trials:
                    raise
                continue
            if not trials or not one.refused:  # the heuristic's own is the yardstick
                trials.append((one.us, values))
        us, best = min(trials, key=lambda trial: trial[0])
        yield Choice(row, best, us, trials[0][0])


def write(choice: Choice, chip: Chip, folder: Path = config.SHIPPED) -> None:
    """Put the choice into the chip's table, under "predicted"."""
    name = TABLES.get(chip.name, chip.arch)
    table = entry(choice.row, Trial(choice.values, choice.us))
    write_table(folder / f"{name}.json", table, gpu=name, part=config.PREDICTED)
