"""Checkpoints of a training run: the weights as ``fastseg predict`` reads them, and beside them all that goes on."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastseg.inference.images import atomic_write
from fastseg.models.weights import read_payload


def write_checkpoint(path: Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` to the disk, whole or not at all; what was at ``path`` stays until the new file is complete.

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
        ValueError: it cannot be read, is none, or its run had other settings.
    """
    payload = read_payload(path)
    if not isinstance(payload, dict) or not isinstance(payload.get("training"), dict):
        raise ValueError(f"{path}: is no checkpoint of fastseg train")
    old = payload["training"]["settings"]
    for name, value in settings.items():
        if old.get(name) != value:
            raise ValueError(f"{path}: its run had {name} = {old.get(name)!r}, this one {value!r}; use the same")
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)
    return payload
