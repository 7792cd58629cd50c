"""Launch configurations, and the one function through which every kernel is launched.

A launcher asks ``select`` for block sizes and launch options. The answer comes, for each kernel and row, from the
first of: an ``override``; the user's tables (``~/.cache/fastseg/tuned``); the shipped tables (``kernels/tuned``); what
a model of the compiled code predicts to be better by a clear margin (in the shipped tables, under "predicted"); the
heuristic that the kernel's file registers, with its reason written beside it. Nothing is searched for at run time:
``fastseg tune`` measures and writes a table, ``make predict TUNE=1`` predicts.
"""

import functools
import importlib.metadata
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


def home() -> Path:
    """The user's folder; where a container gives the user none, one in which nothing is and nothing can be made."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


SHIPPED = Path(__file__).parents[1] / "tuned"
USER = home() / ".cache" / "fastseg" / "tuned"

MEASURED, PREDICTED = "configs", "predicted"  # parts of a table
NEAR = 0.5  # a prediction counts for sizes from half to twice its own

POWERS = ("BLOCK", "LANES", "num_warps")  # beginnings of names: what a kernel's ranges are made of
_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_heuristics: dict[str, Callable[..., dict[str, int]]] = {}
_candidates: dict[str, Callable[..., list[dict[str, int]]]] = {}
_overrides: dict[str, dict[str, int]] = {}
_select_observer: Callable[[str, int, dict], None] | None = None


class Config:
    """Block sizes by name (``cfg.BLOCK_M``), and ``.launch``: all keywords of the launch."""

    launch: dict[str, int]
    source: str

    def __init__(self, values: Mapping[str, int], source: str):
        self.__dict__.update(values)
        self.launch = {**values, "enable_fp_fusion": True}  # named: Triton's default changes in 3.10
        self.source = source

    def __repr__(self) -> str:
        return f"Config({self.launch}, source={self.source!r})"


def heuristic(kernel: str) -> Callable:
    """Register ``f(size, **key) -> values`` as the default configuration of ``kernel``."""

    def add(fn: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
        _heuristics[kernel] = fn
        return fn

    return add


def candidates(kernel: str) -> Callable:
    """Register ``f(size, **key) -> [values, ...]``: what ``fastseg tune`` tries for ``kernel``."""

    def add(fn: Callable[..., list[dict[str, int]]]) -> Callable[..., list[dict[str, int]]]:
        _candidates[kernel] = fn
        return fn

    return add


def candidates_of(kernel: str, size: int, **key) -> list[dict[str, int]]:
    """The heuristic's choice first, then what tuning tries besides; no duplicates."""
    rows = [_heuristics[kernel](size, **key)]
    for row in _candidates.get(kernel, lambda size, **key: [])(size, **key):
        if row not in rows:
            rows.append(row)
    return rows


def kernels() -> list[str]:
    """The names that ``select`` knows."""
    return sorted(_heuristics)


@contextmanager
def override(kernel: str, **values: int) -> Iterator[None]:
    """Use ``values`` for ``kernel`` inside the block; names left out keep the heuristic's value.

    Process-wide, not per thread: a CUDA backward runs on autograd's own threads.
    """
    if kernel not in _heuristics:
        raise KeyError(f"no kernel {kernel!r}; known: {', '.join(kernels())}")
    saved = _overrides.get(kernel)
    _overrides[kernel] = values
    try:
        yield
    finally:
        if saved is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = saved


def row_name(**key) -> str:
    """``C=32,dtype=bf16``: the sorted key, as tables spell it."""
    return ",".join(f"{name}={_DTYPE_NAMES.get(value, value)}" for name, value in sorted(key.items()))


def select(kernel: str, *, size: int, device: torch.device, **key) -> Config:
    """The configuration of ``kernel`` for ``size`` elements (or rows); ``key`` is what else picks a row."""
    if _select_observer is not None:
        _select_observer(kernel, size, key)
    if kernel in _overrides:
        return Config({**_heuristics[kernel](size, **key), **_overrides[kernel]}, "override")
    names = table_names(device.index) if device.type == "cuda" else ()
    return _lookup(kernel, max(size, 1), tuple(key.items()), names)


@contextmanager
def observe_selects(fn: Callable[[str, int, dict], None]) -> Iterator[None]:
    """Inside the block, ``fn(kernel, size, key)`` is called for each configuration a launcher asks for (tuning)."""
    global _select_observer
    saved, _select_observer = _select_observer, fn
    try:
        yield
    finally:
        _select_observer = saved


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, size: int, key: tuple[tuple[str, object], ...], names: tuple[str, ...]) -> Config:
    default = _heuristics[kernel](size, **dict(key))
    row = row_name(**dict(key))
    measured = [(folder / f"{name}.json", MEASURED) for folder in (USER, SHIPPED) for name in names]
    for path, part in (*measured, *((SHIPPED / f"{name}.json", PREDICTED) for name in names)):
        rows = _read_table(path).get(part, {}).get(kernel, {}).get(row)
        if not rows:
            continue
        nearest = min(rows, key=lambda s: (abs(math.log(int(s) / size)), int(s)))
        if part == PREDICTED and not NEAR <= int(nearest) / size <= 1 / NEAR:
            continue
        values = rows[nearest]
        if values.keys() == default.keys():
            return Config(values, str(path) if part == MEASURED else PREDICTED)
        warnings.warn(
            f"fastseg: {path}: {kernel} has {sorted(values)} where {sorted(default)} are asked for; row left out",
            stacklevel=2,
        )
    return Config(default, "heuristic")


def forget_tables() -> None:
    """Read the tables again at the next launch (after tuning wrote one)."""
    _lookup.cache_clear()
    _read_table.cache_clear()


@functools.cache
def _read_table(path: Path) -> dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]:
    """part -> kernel -> row -> size -> values; an unreadable file counts as empty, with one warning.

    What was predicted of another Triton's code says nothing about this one's, and is left out.
    """
    try:
        text = path.read_text()
    except OSError:
        return {}
    try:
        table = json.loads(text)
        written = str(table.get("triton", ""))
        parts = {MEASURED: table[MEASURED], PREDICTED: table.get(PREDICTED, {})}
        for rows in (rows for configs in parts.values() for rows in configs.values()):
            for sizes in rows.values():
                for size, values in sizes.items():
                    if int(size) < 1 or not values or not all(type(v) is int and v > 0 for v in values.values()):
                        raise ValueError(f"size {size}: {values} is not a table of positive integers")
                    if odd := [name for name, v in values.items() if name.startswith(POWERS) and v & (v - 1)]:
                        raise ValueError(f"size {size}: {', '.join(odd)} of {values} must be a power of 2")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        warnings.warn(f"fastseg: the table {path} is left out, it is not readable: {error}", stacklevel=2)
        return {}
    installed = importlib.metadata.version("triton")
    if written.split(".")[:2] != installed.split(".")[:2]:
        parts[PREDICTED] = {}
        if parts[MEASURED]:
            warnings.warn(
                f"fastseg: {path} was tuned with Triton {written}, this is {installed}; run `fastseg tune`",
                stacklevel=2,
            )
    return parts


@functools.cache
def table_names(index: int) -> tuple[str, ...]:
    """The GPU's own table before its architecture's."""
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    return (gpu_name(index), arch)


def gpu_name(index: int) -> str:
    """``NVIDIA_H200``: the name with ``_`` for spaces, the H200 family folded into one, its slices (MIG) not."""
    name = torch.cuda.get_device_name(index).replace(" ", "_")
    return "NVIDIA_H200" if name.startswith("NVIDIA_H200") and "MIG" not in name else name
