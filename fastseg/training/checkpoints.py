"""Checkpoints of a training run: weights as ``fastseg predict`` reads them, and the state of the run."""

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastseg.io.files import atomic_write, open_regular
from fastseg.models.weights import read_payload


def write_checkpoint(path: Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` to the disk atomically: the file at ``path`` stays until the new one is complete.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    buffer = io.BytesIO()  # torch.save would hide the reason of a failed write
    torch.save(dict(payload), buffer)
    try:
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = "; the checkpoint before it is unharmed" if path.exists() else ""
        raise OSError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of a run with the same settings.

    Raises:
        ValueError: it cannot be read, is not a checkpoint, or its run had other settings.
    """
    with open_regular(path):
        payload = read_payload(path)
    training = payload.get("training") if isinstance(payload, dict) else None
    if not isinstance(training, dict) or not isinstance(training.get("settings"), dict):
        raise ValueError(f"{path}: is no checkpoint of fastseg train")
    old = {"loss": "ce"} | training["settings"]  # runs from before there was a choice
    for name, value in settings.items():
        if not _equal(old.get(name), value):
            raise ValueError(f"{path}: its run had {name} = {old.get(name)!r}, this one {value!r}; use the same")
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)
    return payload


def require_kind(saved: object, fresh: object, what: str) -> None:
    """Check that what was saved has the types of a new run's state, entry by entry.

    Raises:
        ValueError: it does not.
    """
    if isinstance(fresh, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"{what} is a {type(saved).__name__}, no dictionary")
        for name, value in fresh.items():
            if name not in saved:
                raise ValueError(f"{what} has no {name!r}")
            require_kind(saved[name], value, f"{what} {name!r}")
    elif isinstance(fresh, list):
        if not isinstance(saved, list) or len(saved) < len(fresh):
            raise ValueError(f"{what} is no list of {len(fresh)} entries or more")
        for one, value in zip(saved, fresh, strict=False):
            require_kind(one, value, f"an entry of {what}")
    elif isinstance(fresh, (int, float)) and not isinstance(fresh, bool):
        kinds = (int,) if isinstance(fresh, int) else (int, float)
        if type(saved) not in kinds or not -math.inf < saved < math.inf:
            raise ValueError(f"{what} is {saved!r:.60}, no finite number")
        if fresh == 0 and saved < 0:
            raise ValueError(f"{what} is {saved}, less than 0")
    elif fresh is not None and type(saved) is not type(fresh):
        raise ValueError(f"{what} is a {type(saved).__name__}, no {type(fresh).__name__}")


def _equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # a tensor, which no setting is
        return False


def refuse_other_data(path: Path, training: Mapping[str, Any], data: Mapping[str, Any], allowed: bool) -> bool:
    """True if the data set differs from that of the checkpoint's run; a checkpoint without marks counts as equal.

    Raises:
        ValueError: it differs, and this is not allowed.
    """
    old = training.get("data")
    if not isinstance(old, Mapping) or not old or not data or _equal(dict(old), dict(data)):
        return False
    if allowed:
        return True
    changes = []
    for name, now in data.items():
        before = old.get(name)
        if before == now:
            continue
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            counts = before.get("pictures"), now.get("pictures")
            what = "other contents" if counts[0] == counts[1] else f"{counts[1]} pictures, and had {counts[0]}"
            changes.append(f"{name} has {what}")
        else:
            changes.append(f"{name} is {now!r}, and was {before!r}")
    raise ValueError(
        f"{path}: the data set is not that of its run: {'; '.join(changes)}; put it back, begin anew with another -o, "
        "or go on all the same with --changed-data"
    )


def require_finite(state: Mapping[str, Tensor], step: int) -> None:
    """Check that weights are finite before they are written or scored.

    Raises:
        Diverged: they are not finite.
    """
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise Diverged(
            f"training diverged: {len(bad)} of {len(state)} tensors, as {bad[0]}, are not finite after step {step}; "
            "they were not written; try a smaller --lr"
        )


class Diverged(ValueError):
    """The loss or the weights are not finite any more."""
