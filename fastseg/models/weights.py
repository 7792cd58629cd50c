"""Load weights from a local file; everything is checked before any tensor is copied."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseg.models.encoders import VGG16, MobileNetV2, ResNet, Xception65
from fastseg.models.files import read_payload
from fastseg.models.keys import Form, encoder_forms, model_forms
from fastseg.models.locate import Found, first, locate

__all__ = ["checked", "fill", "load_encoder_weights", "load_weights", "read_payload", "weight_file"]

ENCODER_TYPES = (VGG16, ResNet, MobileNetV2, Xception65)


def load_weights(model: nn.Module, path: str | os.PathLike, *, key: str | None = None) -> None:
    """Load a ``state_dict`` from a local file into ``model``.

    Reads safetensors files, and those of ``torch.save`` by ``torch.load(weights_only=True)``: code in a pickle is
    refused, never executed. Wrappers that training code puts around a ``state_dict`` are stripped, in any combination:
    dictionaries, such as those under "state_dict", "model_state_dict" or "model_ema", and prefixes of every name, such
    as "module." of DistributedDataParallel and AveragedModel, "model." of Lightning, "_orig_mod." of ``torch.compile``.
    Entries beside "model." and the like are left out with a warning. Otherwise loading is strict: names, shapes and
    kinds of numbers must fit, and every value must be finite; only BatchNorm's ``num_batches_tracked`` may be absent,
    as it is from old files. If anything does not fit, the model is left unchanged.

    Names of other codes are known for networks that we share: https://github.com/kazuto1011/deeplab-pytorch
    (``DeepLabV2``), segmentation_models_pytorch (``DeepLabV3``), the FCN article (``FCN``), and files converted from
    Caffe's SegNet, whose eps is then given to all norms of ``SegNet`` and ``SegNetBasic``. A head that the model lacks,
    torchvision's ``aux_classifier``, is left out with a warning.

    Args:
        model: filled in place; its devices and dtypes stay.
        path: the file, or a folder of ``save_pretrained`` with one. Nothing is downloaded.
        key: name on the way to one set of weights, such as "model_ema"; needed if several in the file fit.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, does not fit the model, or holds several sets of weights that fit.
    """
    path = weight_file(path, "load_weights")
    found = checked(read_payload(path), path, type(model).__name__, model.state_dict(), model_forms(model), key=key)
    fill(model, found)


def load_encoder_weights(model: nn.Module, path: str | os.PathLike, *, key: str | None = None) -> None:
    """Load classification weights into the encoder of ``model``.

    It reads torchvision's vgg16, vgg16_bn, resnet18 to resnet101 and mobilenet_v2; the files of MobileNetV2 and
    Xception that the code of the DeepLabV3+ article starts from; timm's xception65, for ``preset="google"``; and the
    ResNet of https://github.com/kazuto1011/deeplab-pytorch, for ``DeepLabV2``. It reads and checks the file as
    ``load_weights`` does. The classifier is left out, except for FCN on VGG16, where its first two layers become fc6
    and fc7. If anything does not fit, the model is left unchanged.

    Args:
        model: an encoder, or a model with one; its other tensors stay.
        path: the file. Nothing is downloaded.
        key: name on the way to one set of weights, such as "model_ema"; needed if several in the file fit.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: the model has no encoder, or several.
        ValueError: the file cannot be read, or does not fit the encoder.
    """
    encoder, expected = _encoder_state(model)
    path = weight_file(path, "load_encoder_weights")
    name = f"the encoder of {type(model).__name__}"
    forms = encoder_forms(encoder, expected)
    found = checked(read_payload(path), path, name, expected, forms, key=key, function="load_encoder_weights")
    with torch.no_grad():
        for target, value in found.tensors.items():
            expected[target].copy_(value)


def checked(
    payload: object,
    path: Path,
    name: str,
    expected: Mapping[str, Tensor],
    forms: list[Form],
    *,
    key: str | None = None,
    function: str = "load_weights",
) -> Found:
    """Return the tensors of ``payload`` under the names of ``expected``, if they fit in every respect.

    Raises:
        ValueError: they do not fit; the message says that they do not fit ``name``.
    """
    found = locate(payload, forms, path, key=key, encoder=function == "load_encoder_weights")
    if found.form.flat:
        found = found._replace(tensors={k: _flat(v, expected[k]) for k, v in found.tensors.items()})
    faults = _faults(found, expected)
    if faults:
        under = f", which are looked for under {found.place!r}" if found.place else ""
        raise ValueError(f"{function}: {path} does not fit {name}: {'; '.join(faults)}{under}")
    if found.form.refusal:
        raise ValueError(f"{function}: {path} has names of {found.form.source}: {found.form.refusal}")
    for note in found.notes:
        warnings.warn(f"{function}: {path}: {note}", stacklevel=3)
    return found


def fill(model: nn.Module, found: Found) -> None:
    """Copy checked tensors into ``model``."""
    state = model.state_dict()
    constants = {k: torch.full_like(state[k], value) for k, value in found.form.constants.items()}
    model.load_state_dict(found.tensors | constants, strict=False)  # not strict about num_batches_tracked alone
    if found.form.eps is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = found.form.eps


def _encoder_state(model: nn.Module) -> tuple[nn.Module | None, dict[str, Tensor]]:
    """The model's encoder, and its tensors in torchvision's names and shapes, or the DeepLabV3+ article's."""
    if hasattr(model, "encoder_state"):  # its own names are others
        return None, model.encoder_state()
    encoders = [module for module in model.modules() if isinstance(module, ENCODER_TYPES)]
    if len(encoders) != 1:
        kinds = ", ".join(kind.__name__ for kind in ENCODER_TYPES)
        raise TypeError(
            f"load_encoder_weights: {type(model).__name__} has {len(encoders)} encoders of type {kinds}; give a model "
            "with one, or the encoder itself"
        )
    return encoders[0], encoders[0].state_dict()


IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # of SMP's and Hugging Face's save_pretrained


def weight_file(path: str | os.PathLike, function: str) -> Path:
    """The file itself, or the one in a folder of ``save_pretrained``."""
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not inside:
            held = "weights in several parts" if list(path.glob("*.index.json")) else f"no {' or '.join(IN_FOLDERS)}"
            raise FileNotFoundError(f"{function}: no file at {path}, a folder with {held}; name a file, or save one")
        path = inside[0]
    if not path.is_file():
        raise FileNotFoundError(f"{function}: no file at {path}; weights are read from local files only")
    return path


def _flat(value: object, expected: Tensor) -> object:
    """Flatten a vector that was saved with more dimensions."""
    if isinstance(value, Tensor) and expected.dim() == 1 and value.numel() == expected.numel():
        return value.flatten()
    return value


def _faults(found: Found, expected: Mapping[str, Tensor]) -> list[str]:
    """Why the tensors cannot be loaded, one entry per kind of fault; names and shapes come before values."""
    tensors, names = found.tensors, found.form.names
    mismatched = [
        f"{names[key]}: {_describe(value)} in the file, {_describe(expected[key])} in the model"
        for key, value in tensors.items()
        if not _fits(value, expected[key])
    ]
    kinds = {"missing": found.missing, "unexpected": found.unexpected, "mismatched": mismatched}
    if not any(kinds.values()):
        # As the model will hold it: a large float32 is infinite in float16.
        kinds["not finite"] = [
            names[key] for key, value in tensors.items() if not value.to(expected[key].dtype).isfinite().all()
        ]
    return [f"{len(keys)} {kind} ({first(keys)})" for kind, keys in kinds.items() if keys]


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
