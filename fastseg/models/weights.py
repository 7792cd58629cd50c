"""Weights from a local file, checked as a whole before any of them is copied."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseg.models.encoders import VGG16, ResNet

WRAPPERS = ("state_dict", "model_state", "model", "net")  # keys under which training code stores the tensors
PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
CLASSIFIERS = ("classifier.", "fc.")  # torchvision's, which no encoder has
SHOWN = 3  # keys of each kind that an error lists


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a ``state_dict`` from a local file into ``model``.

    Reads safetensors, and files of ``torch.save`` by ``torch.load(weights_only=True)``: code in a pickle is refused,
    not executed. A dictionary under "state_dict", "model_state", "model" or "net" is unwrapped; the prefixes "module."
    and "_orig_mod." are dropped where every key has them. Strict: names, shapes and kinds of numbers must fit, and
    every value must be finite; only BatchNorm's ``num_batches_tracked`` may be absent, as it is from old files. Unless
    all of it fits, the model is left as it was.

    Args:
        model: filled in place; its devices and dtypes stay.
        path: the file. Nothing is downloaded.

    Raises:
        FileNotFoundError: no file is there.
        ValueError: the file cannot be read, or does not fit the model.
    """
    tensors = _read(path, "load_weights")
    faults = _faults(tensors, model.state_dict())
    if faults:
        raise ValueError(f"load_weights: {path} does not fit {type(model).__name__}: {'; '.join(faults)}")
    model.load_state_dict(tensors, strict=False)  # not strict about num_batches_tracked; the rest is checked


def load_encoder_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load torchvision's classification weights into the encoder of ``model``: vgg16, vgg16_bn, resnet18 to resnet101.

    Reads and checks the file as ``load_weights`` does. Its classifier is left out, but for FCN on VGG16, whose fc6 and
    fc7 are the first two layers of it. Unless the encoder fits, the model is left as it was.

    Args:
        model: an encoder, or a model with one; its other tensors stay.
        path: the file. Nothing is downloaded.

    Raises:
        FileNotFoundError: no file is there.
        TypeError: the model has no such encoder, or several.
        ValueError: the file cannot be read, or does not fit the encoder.
    """
    expected = _encoder_state(model)
    tensors = _read(path, "load_encoder_weights")
    tensors = {key: value for key, value in tensors.items() if key in expected or not key.startswith(CLASSIFIERS)}
    faults = _faults(tensors, expected)
    if faults:
        raise ValueError(
            f"load_encoder_weights: {path} does not fit the encoder of {type(model).__name__}: {'; '.join(faults)}"
        )
    with torch.no_grad():
        for key, value in tensors.items():
            expected[key].copy_(value)


def _encoder_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's encoder, in torchvision's names and shapes."""
    if hasattr(model, "encoder_state"):  # its own names are others
        return model.encoder_state()
    encoders = [module for module in model.modules() if isinstance(module, (VGG16, ResNet))]
    if len(encoders) != 1:
        raise TypeError(
            f"load_encoder_weights: {type(model).__name__} has {len(encoders)} encoders of type VGG16 or ResNet; give "
            "a model with one, or the encoder itself"
        )
    return encoders[0].state_dict()


def _read(path: str | os.PathLike, function: str) -> dict[str, Tensor]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{function}: no file at {path}; weights are read from local files only")
    return unwrap(read_payload(path), path)


def read_payload(path: Path) -> object:
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # eight bytes of length, then JSON
            return _read_safetensors(path)
        zipped = head.startswith(b"PK")
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was written; the reader has one line to read
            # Mapped, a tensor cannot claim more bytes than the file has.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_weights: {path} is damaged, or holds Python objects besides tensors (refused, not executed); "
            "save model.state_dict() alone"
        ) from error
    except Exception as error:  # on a damaged file the readers raise anything from KeyError to RuntimeError
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"load_weights: cannot read {path} as safetensors or PyTorch weights: {reason}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("it is a safetensors file; install the package safetensors") from error
    return load_file(path)


def _check_archive(path: Path) -> None:
    """torch.load looks at neither: compressed records are read as if they were not, checksums not at all."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it is a compressed archive, which torch.save never writes")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong; the file is damaged")


def unwrap(payload: object, path: Path) -> dict[str, Tensor]:
    inner = payload
    while isinstance(inner, Mapping):
        payload = inner
        inner = next((payload[key] for key in WRAPPERS if isinstance(payload.get(key), Mapping)), None)
    if not isinstance(payload, Mapping) or not payload or not all(isinstance(key, str) for key in payload):
        raise ValueError(f"load_weights: {path} holds a {type(payload).__name__}, not a dictionary of named tensors")
    tensors = dict(payload)
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _faults(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What keeps ``tensors`` from being loaded, one entry per kind; names and shapes before any value is looked at."""
    missing = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in expected]
    shared = [key for key in tensors if key in expected]
    mismatched = [
        f"{key}: {_describe(tensors[key])} in the file, {_describe(expected[key])} in the model"
        for key in shared
        if not _fits(tensors[key], expected[key])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    if not any(kinds.values()):
        # As the model will hold it: a large float32 is infinite in float16.
        kinds["not finite"] = [key for key in shared if not tensors[key].to(expected[key].dtype).isfinite().all()]
    return [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]


def _fits(value: object, expected: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and value.shape == expected.shape
        and (value.is_floating_point(), value.is_complex()) == (expected.is_floating_point(), expected.is_complex())
    )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
