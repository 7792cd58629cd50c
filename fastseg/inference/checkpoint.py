"""Weights that know their model: one file with the model's name, its options, its classes' names, and its tensors.

The file is what ``torch.save`` makes of ``{"model": name, "options": {...}, "classes": [...], "state_dict": {...}}``:
plain data and tensors, which ``torch.load(weights_only=True)`` reads. A bare ``state_dict`` is read as well.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseg.inference.images import atomic_write, first_line
from fastseg.models import create, load_weights
from fastseg.models.weights import read_payload, unwrap


def save_checkpoint(
    path: str | Path, model: nn.Module, name: str, options: Mapping[str, Any], classes: Sequence[str]
) -> None:
    """Write the weights of ``model``, which is ``create(name, len(classes), **options)``, whole or not at all."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"model": name, "options": dict(options), "classes": list(classes), "state_dict": state}, file)


def load_checkpoint(
    path: str | Path, name: str | None = None, num_classes: int | None = None
) -> tuple[nn.Module, list[str]]:
    """Build the model that a file of weights belongs to, in eval mode on the CPU, and the names of its classes.

    Nothing is allocated for the model before names and shapes were found to fit.

    Args:
        path: a checkpoint, or a bare ``state_dict`` of a model with default options.
        name: of the model; None takes the checkpoint's.
        num_classes: None takes the number that the shapes of the classifier say.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a directory.
        ValueError: the file cannot be read, or is not of this model.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a directory; name a file with weights")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no file with weights is there")
    payload = read_payload(path)
    tensors = unwrap(payload, path)
    described = payload if isinstance(payload, Mapping) and isinstance(payload.get("model"), str) else {}
    if described and name not in (None, described["model"]):
        raise ValueError(f"{path}: holds weights of {described['model']!r}, not of {name!r}")
    name = name or described.get("model")
    if name is None:
        raise ValueError(f"{path}: does not say which model it is of; name it with --model")
    options = described.get("options", {})
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"{path}: its model options are {options!r}, not a dictionary")
    num_classes = num_classes or _classes_in(tensors, name, options, path)
    skeleton = _skeleton(name, num_classes, options, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a skeleton keeps nothing of what it is given
        load_weights(skeleton, path)  # raises where names or shapes differ
    model = create(name, num_classes, **options)
    load_weights(model, path)
    classes = described.get("classes")
    if not isinstance(classes, list) or len(classes) != num_classes:
        classes = [str(index) for index in range(num_classes)]
    return model.eval(), [str(label) for label in classes]


def _skeleton(name: str, num_classes: int, options: Mapping[str, Any], path: Path) -> nn.Module:
    """The model without memory for its tensors."""
    try:
        with torch.device("meta"):
            return create(name, num_classes, **options)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: sizes beyond what torch can count
        raise ValueError(f"{path}: no model {name!r} with options {dict(options)}: {first_line(error)}") from error


def _classes_in(tensors: Mapping[str, Tensor], name: str, options: Mapping[str, Any], path: Path) -> int:
    """The number of classes: the first size of the tensors whose shape depends on it."""
    two, three = (_skeleton(name, count, options, path).state_dict() for count in (2, 3))
    sizes = {
        tensors[key].shape[0]
        for key in two
        if two[key].shape != three[key].shape and isinstance(tensors.get(key), Tensor) and tensors[key].dim() > 0
    }
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"{path}: not weights of {name!r}: its classifier is not in the file")
    return sizes.pop()
