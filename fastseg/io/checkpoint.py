"""Weights that name their model: one file with the model's name, options, class names, and tensors.

The file is ``torch.save`` of ``{"model": name, "options": {...}, "classes": [...], "state_dict": {...}}``: plain data
and tensors, which ``torch.load(weights_only=True)`` reads. A bare ``state_dict`` is read as well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseg.io.images import atomic_write, first_line
from fastseg.models import create
from fastseg.models.files import read_payload
from fastseg.models.keys import model_forms
from fastseg.models.locate import locate
from fastseg.models.weights import checked, fill, weight_file

MANY = 9_973  # classes; no layer has a width of that


def save_checkpoint(
    path: str | Path, model: nn.Module, name: str, options: Mapping[str, Any], classes: Sequence[str]
) -> None:
    """Write the weights of ``model``, which is ``create(name, len(classes), **options)``, atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"model": name, "options": dict(options), "classes": list(classes), "state_dict": state}, file)


class Checkpoint(NamedTuple):
    """A model with its weights, in eval mode on the CPU, and what ``save_checkpoint`` takes to write it again."""

    model: nn.Module
    name: str
    options: dict[str, Any]
    classes: list[str]


def load_checkpoint(
    path: str | Path,
    name: str | None = None,
    num_classes: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> tuple[nn.Module, list[str]]:
    """Build the model that a file of weights belongs to; return it and its class names, as ``read_checkpoint``."""
    found = read_checkpoint(path, name, num_classes, options=options, key=key)
    return found.model, found.classes


def read_checkpoint(
    path: str | Path,
    name: str | None = None,
    num_classes: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Checkpoint:
    """Build the model that a file of weights belongs to.

    The file is read once. Memory for the model is allocated only after names and shapes were found to fit.

    Args:
        path: a checkpoint, or any file or folder of ``save_pretrained`` that ``fastseg.models.load_weights`` reads.
        name: of the model; None means the checkpoint's.
        num_classes: None means the number in the shapes of the classifier.
        options: of the model's constructor; they override the checkpoint's own.
        key: name on the way to one set of weights, such as "model_ema"; needed if several in the file fit.

    Raises:
        FileNotFoundError: the file does not exist.
        IsADirectoryError: the path is a directory without weights.
        ValueError: the file cannot be read, or does not belong to this model.
    """
    path = Path(path)
    if path.is_dir():
        try:
            path = weight_file(path, "load_checkpoint")
        except FileNotFoundError as error:
            raise IsADirectoryError(f"{path}: is a directory; name a file with weights") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no file with weights is there")
    payload = read_payload(path)
    described = payload if isinstance(payload, Mapping) and isinstance(payload.get("model"), str) else {}
    if described and name not in (None, described["model"]):
        raise ValueError(f"{path}: holds weights of {described['model']!r}, not of {name!r}")
    name = name or described.get("model")
    if name is None:
        raise ValueError(f"{path}: does not say which model it is of; name it with --model")
    own = described.get("options", {})
    if not isinstance(own, Mapping) or not all(isinstance(option, str) for option in own):
        raise ValueError(f"{path}: its model options are {own!r}, not a dictionary")
    options = {**own, **(options or {})}
    num_classes = num_classes or _classes_in(payload, name, options, path, key)
    model = _skeleton(name, num_classes, options, path)
    found = checked(payload, path, type(model).__name__, model.state_dict(), model_forms(model), key=key)
    model = model.to_empty(device="cpu")
    for buffer in model.buffers():  # num_batches_tracked need not be in the file
        buffer.zero_()
    fill(model, found)
    classes = described.get("classes")
    if not isinstance(classes, list) or len(classes) != num_classes:
        classes = [str(index) for index in range(num_classes)]
    return Checkpoint(model.eval(), name, options, [str(label) for label in classes])


def _skeleton(name: str, num_classes: int, options: Mapping[str, Any], path: Path) -> nn.Module:
    """The model without memory for its tensors."""
    try:
        with torch.device("meta"):
            return create(name, num_classes, **options)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no model {name!r} with options {dict(options)}: {first_line(error)}") from error


def _classes_in(payload: object, name: str, options: Mapping[str, Any], path: Path, key: str | None) -> int:
    """The number of classes: the size that the file has where a model of ``MANY`` classes has that many."""
    model = _skeleton(name, MANY, options, path)
    found = locate(payload, model_forms(model), path, key=key)
    counts = {target: tuple(value.shape) for target, value in model.state_dict().items() if MANY in value.shape}
    sizes = {
        found.tensors[target].shape[shape.index(MANY)]
        for target, shape in counts.items()
        if isinstance(found.tensors.get(target), Tensor) and found.tensors[target].dim() == len(shape)
    }
    if len(sizes) != 1 or 0 in sizes:
        names = ", ".join(found.form.names.get(target, target) for target in counts)
        why = "its classifier gives no one number of classes" if sizes else "its classifier is not in the file"
        raise ValueError(f"{path}: not weights of {name!r} with options {dict(options)}: {why} ({names})")
    return sizes.pop()
