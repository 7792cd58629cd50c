"""Models by one text: our names, other libraries' names, folders, files, and Python paths."""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastseg.exporting.file_model import FileModel
from fastseg.io.checkpoint import load_checkpoint
from fastseg.io.files import first_line
from fastseg.models import create, load_weights, names
from fastseg.ops.logits import logits_of

FORMS = "smp:ARCHITECTURE/ENCODER, torchvision:NAME, hf:FOLDER, FILE.onnx, FILE.pt2, package.module:factory"
CLASSES = 21  # of a model that neither its weights nor the caller gives a number


def load_model(
    source: str | None,
    *,
    weights: str | Path | None = None,
    classes: int | None = None,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> tuple[nn.Module, list[str]]:
    """The model that ``source`` names, in evaluation mode on the CPU, and the names of its classes.

    Args:
        source: one of ``fastseg.models.names()``; "smp:Unet/resnet34", of segmentation_models_pytorch;
            "torchvision:deeplabv3_resnet50"; "hf:FOLDER", of ``save_pretrained``; "FILE.onnx" or "FILE.pt2";
            "package.module:factory", which is called with ``options``, in the current folder or installed. None means
            what the weights say. Nothing is downloaded.
        weights: a file as ``fastseg.models.load_weights`` reads it; None means random weights, or the source's own.
        classes: their number; None means what the weights say, or 21.
        options: keywords of the model's constructor.
        key: as for ``load_weights``.

    Raises:
        ValueError: there is no such model, option or file, or it cannot be built.
        ImportError: the library is not installed.
        FileNotFoundError: there is no such file of weights.
    """
    options = dict(options or {})
    if source is None or source in names():
        return _own(source, weights, classes, options, key)
    kind, colon, rest = source.partition(":")
    carries = source.endswith((".onnx", ".pt2")) or kind == "hf"  # its own weights
    for given, name in ((weights, "weights"), (classes, "classes"), (options, "options")):
        if carries and given:
            raise ValueError(f"{source}: has its own {name}; leave them out")
    if source.endswith((".onnx", ".pt2")):
        model: nn.Module = FileModel(source)
    elif colon and kind in ("smp", "torchvision"):
        model = _called(source, _smp if kind == "smp" else _torchvision, rest, classes or CLASSES, options)
    elif colon and kind == "hf":
        model = _called(source, _hugging_face, rest)
    elif colon and kind.isidentifier() | ("." in kind and kind.replace(".", "").isidentifier()):
        if classes:
            options["classes"] = classes
        model = _called(source, _factory, kind, rest, options)
    else:
        raise ValueError(f"no model {source!r}; give one of {', '.join(names())}, or {FORMS}")
    model = model.eval()
    if weights is not None:
        load_weights(model, weights, key=key)
    return model, _class_names(model, source)


def is_source(text: str) -> bool:
    """True if the text has one of the forms that ``load_model`` knows; what it names need not exist."""
    return text in names() or text.endswith((".onnx", ".pt2")) or ":" in text


def has_weights(source: str) -> bool:
    """True for a source that brings weights of its own: a file, a folder, or a factory."""
    kind = source.partition(":")[0]
    return source not in names() and kind not in ("smp", "torchvision")


def _own(
    name: str | None, weights: str | Path | None, classes: int | None, options: dict[str, Any], key: str | None
) -> tuple[nn.Module, list[str]]:
    if weights is not None:
        return load_checkpoint(weights, name, classes, options=options, key=key)
    if name is None:
        raise ValueError("no model: give --model, or --weights that say which model they are of")
    count = classes or CLASSES
    try:
        return create(name, count, **options).eval(), [str(index) for index in range(count)]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"no model {name} with the options {options}: {first_line(error)}") from error


def _called(source: str, build, *args: Any) -> nn.Module:
    """``build(*args)``; whatever a library or a factory raises becomes one line."""
    try:
        model = build(*args)
    except ImportError as error:
        raise ImportError(f"{source}: {first_line(error)}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {first_line(error)}") from error
    except Exception as error:
        raise ValueError(f"{source}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source}: gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{name} is not installed: pip install {package}") from None


def _smp(rest: str, classes: int, options: dict[str, Any]) -> nn.Module:
    smp = _library("segmentation_models_pytorch", "segmentation-models-pytorch")
    architecture, _, encoder = rest.partition("/")
    known = {name.lower(): name for name in vars(smp) if hasattr(getattr(smp, name), "forward")}
    if architecture.lower() not in known:
        raise ValueError(f"no architecture {architecture!r}; there are {', '.join(sorted(known.values()))}")
    named = {"encoder_name": encoder} if encoder else {}
    make = getattr(smp, known[architecture.lower()])
    return make(**{"encoder_weights": None, "classes": classes, **named, **options})


def _torchvision(name: str, classes: int, options: dict[str, Any]) -> nn.Module:
    models = _library("torchvision", "torchvision").models
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise ValueError(f"no segmentation model {name!r}; there are {', '.join(known)}")
    return models.get_model(name, **{"weights": None, "weights_backbone": None, "num_classes": classes, **options})


def _hugging_face(folder: str) -> nn.Module:
    transformers = _library("transformers", "transformers")
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder}: no folder with a config.json, as save_pretrained writes it")
    return transformers.AutoModelForSemanticSegmentation.from_pretrained(folder, local_files_only=True)


def _factory(module: str, name: str, options: dict[str, Any]) -> nn.Module:
    if os.getcwd() not in sys.path:  # the command, unlike python -m, does not look there
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {name!r}")
        found = getattr(found, part)
    return found if isinstance(found, nn.Module) else found(**options)


def _class_names(model: nn.Module, source: str) -> list[str]:
    """Names that the model has, or as many numbers as its logits have classes."""
    if isinstance(model, FileModel) and model.classes is not None:
        return model.classes
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, Mapping) and labels:
        return [str(label) for _, label in sorted(labels.items())]
    if isinstance(model, FileModel) and model.output != "logits":
        raise ValueError(f"{source}: does not say its classes")
    try:
        with torch.no_grad():
            logits = logits_of(model(torch.zeros(1, 3, 64, 64)))
    except Exception as error:
        raise ValueError(f"{source}: fails on a picture of 64x64: {first_line(error)}") from error
    if logits is None:
        raise ValueError(f"{source}: returns no logits (N, classes, H, W)")
    return [str(index) for index in range(max(2, logits.shape[1]))]
