"""Search launch configurations on the GPU at hand and write them as a table that ``config.select`` reads.

For each row that a workload asks for (``watch.py``), every candidate is compiled and judged by its spills and shared
memory, checked against the heuristic's result in NaN-filled memory, and only then timed. Nothing here knows the names
of a kernel's blocks.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor
from triton.errors import TritonError

from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.launch import run
from fastseg.kernels.runtime.torch_private import tree_leaves
from fastseg.kernels.tools.machine_code import read_code
from fastseg.kernels.tools.report import TARGETS, occupancy
from fastseg.kernels.tools.triton_private import JITFunction
from fastseg.kernels.tools.watch import Launch, Row, Workload, observe, planned

# Two configurations sum in different orders: a few roundings of the result's dtype, relative to its norm.
AGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MARGIN = 0.98  # a candidate replaces the heuristic only where it takes less than this share of its time: not noise

Table = dict[str, dict[str, dict[str, dict[str, int]]]]  # kernel -> row -> size -> values


class Trial(NamedTuple):
    """A candidate and what became of it: microseconds, or None and the reason in ``note``."""

    values: dict[str, int]
    us: float | None
    note: str = ""


def disagreement(got: object, want: object) -> float:
    """Largest relative L2 distance between tensors of two results, over what their dtype allows: at most 1 agrees."""
    worst = 0.0
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    for a, b in ((a, b) for a, b in pairs if isinstance(a, Tensor)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else math.inf)
            continue
        a64, b64 = a.detach().double(), b.detach().double()
        error = float((a64 - b64).norm() / b64.norm().clamp_min(1e-30)) if b.numel() else 0.0
        worst = max(worst, error / AGREEMENT[a.dtype]) if error == error else math.inf
    return worst


@contextmanager
def _nan_filled() -> Iterator[None]:
    """New tensors hold NaN: memory freed by a correct run cannot stand in for a store that a candidate left out."""
    saved, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(saved, warn_only=warn_only)


def device_us(launches: Sequence[Launch]) -> float:
    """Median device time of the launches, in microseconds, the L2 cache emptied before each repetition."""

    def repeat() -> None:
        for launch in launches:
            run(*launch)

    return triton.testing.do_bench(repeat, warmup=10, rep=40, return_mode="median") * 1e3


def wall_us(launches: Sequence[Launch]) -> float:
    """Microseconds of one run of the launches by the host's clock, for the interpreter, which has no other."""
    begin = time.perf_counter()
    for launch in launches:
        run(*launch)
    return (time.perf_counter() - begin) * 1e6


def compiled_badly(launches: Sequence[Launch]) -> str:
    """Compile the launches for this device; return why they are not worth running, or "". Interpreted ones pass."""
    for kernel, grid, args, kwargs in launches:
        if not isinstance(kernel, JITFunction):
            continue
        compiled = kernel.warmup(
            *args, grid=grid, **kwargs
        )  # stays in Triton's cache: the launch does not compile again
        code, arch = read_code(compiled.asm), compiled.metadata.target.arch
        if code.spills or code.stack:
            return f"{code.spills} spills, {code.stack} bytes of stack"
        target = TARGETS.get(arch if isinstance(arch, str) else f"sm_{arch}")
        if target is None:
            continue
        if compiled.metadata.shared > target.block_shared:
            return f"{compiled.metadata.shared} bytes of shared memory, {target.block_shared} allowed"
        blocks, limiter = occupancy(target, compiled.metadata.num_warps, code, compiled.metadata.shared)
        if blocks < 1:
            return f"no block fits: {limiter}"
    return ""


def search(
    workload: Workload,
    row: Row,
    *,
    timer: Callable[[Sequence[Launch]], float] = device_us,
    implausible: Callable[[Sequence[Launch]], str] = compiled_badly,
    deadline: float = math.inf,
) -> list[Trial]:
    """Try each candidate of ``row`` on ``workload``.

    Args:
        workload: function that asks for ``row``.
        row: the question; while it is searched, the candidate answers every question of the same kernel.
        timer: launches -> microseconds.
        implausible: launches -> why they are not worth running (spills, ...), or "".
        deadline: ``time.monotonic()`` after which no further candidate is started.

    Returns:
        The trials, the heuristic's first; the ones that ran and agreed have a time.
    """
    trials: list[Trial] = []
    with _nan_filled(), config.override(row.kernel):
        expected = workload()
    for values in config.candidates_of(row.kernel, row.size, **dict(row.key)):
        if trials and time.monotonic() > deadline:
            break
        try:
            with config.override(row.kernel, **values):
                why = (
                    implausible(planned(workload, row)) if trials else ""
                )  # the heuristic is the yardstick: always timed
                if why:
                    trials.append(Trial(values, None, why))
                    continue
                with _nan_filled():
                    got, rows = observe(workload)
                error = disagreement(got, expected)
                if error <= 1:
                    trials.append(Trial(values, timer(rows[row])))
                else:
                    trials.append(Trial(values, None, f"wrong: {error:.3g} times the distance allowed"))
        except (TritonError, RuntimeError) as error:  # a refusal, MLIR's too, or too much shared memory
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a fault of the device stays, and goes up
            trials.append(
                Trial(values, None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")
            )
    return trials


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest trial; the heuristic's (the first) if none is faster by more than ``MARGIN``; None if none ran."""
    timed = [trial for trial in trials if trial.us is not None]
    if not timed:
        return None
    fastest, first = min(timed, key=lambda trial: trial.us), trials[0]
    return first if first.us is not None and fastest.us > MARGIN * first.us else fastest


def entry(row: Row, trial: Trial) -> Table:
    """The table that holds ``trial`` as the answer to ``row``."""
    return {row.kernel: {config.row_name(**dict(row.key)): {str(max(row.size, 1)): trial.values}}}


def tune(
    rows: Sequence[tuple[Row, Workload]],
    each: Callable[[Row, list[Trial]], None],
    *,
    seconds: float = math.inf,
    **options,
) -> list[Row]:
    """Search rows one after another.

    Args:
        rows: from ``rows_of``.
        each: called with each row's trials when they are done, to show progress and to write what ``best`` finds.
        seconds: time after which no further row is started.
        options: of ``search``.

    Returns:
        The rows for which no time was left.
    """
    deadline = time.monotonic() + seconds
    for done, (row, workload) in enumerate(rows):
        if time.monotonic() > deadline:
            return [row for row, _ in rows[done:]]
        each(row, search(workload, row, deadline=deadline, **options))
    return []


def write_table(path: Path, table: Table, *, gpu: str, part: str = config.MEASURED) -> None:
    """Write ``table`` to ``path`` in one step; other rows of a table there from the same Triton minor version stay.

    Args:
        path: ``<folder>/<gpu>.json``; the folder is made.
        table: kernel -> row -> size -> values.
        gpu: ``config.gpu_name`` of the device it was measured on, or predicted for.
        part: ``config.MEASURED``, or ``config.PREDICTED``, which counts where nothing was measured.
    """
    parts: dict[str, Table] = {}
    try:
        old = json.loads(path.read_text())
        if str(old["triton"]).split(".")[:2] == triton.__version__.split(".")[:2]:
            parts = {name: old[name] for name in (config.MEASURED, config.PREDICTED) if name in old}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or not readable: replaced
    for kernel, rows in table.items():
        for row, sizes in rows.items():
            parts.setdefault(part, {}).setdefault(kernel, {}).setdefault(row, {}).update(sizes)
    parts.setdefault(config.MEASURED, {})
    head = {"gpu": gpu, "triton": triton.__version__, "torch": torch.__version__, "date": date.today().isoformat()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**head, **parts}, indent=1, sort_keys=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
    config.forget_tables()
