"""Other libraries' losses, in float64, and a comparison with them on upsampled logits."""

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

N, C, LOW, FULL = 2, 4, (3, 5), (9, 13)
DEEP, VOLUME = (2, 3, 2), (4, 5, 6)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)


def found(name):
    """The library, or a skip that says why; its heavy parts are left out where only they do not import."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


def smp():
    """Its losses need torch only; the package itself needs timm."""
    path = importlib.util.find_spec(found("segmentation_models_pytorch")).submodule_search_locations[0]
    package = sys.modules.get("smp_losses")
    if package is None:
        spec = importlib.util.spec_from_file_location(
            "smp_losses", f"{path}/losses/__init__.py", submodule_search_locations=[f"{path}/losses"]
        )
        package = sys.modules["smp_losses"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return package


def monai():
    found("monai")
    return pytest.importorskip("monai.losses", exc_type=ImportError)


def nnunet():
    found("nnunetv2")
    return pytest.importorskip("nnunetv2.training.loss.compound_losses", exc_type=ImportError)


def ultralytics():
    """The module of its losses needs OpenCV for parts that are not tried here."""
    path = importlib.util.find_spec(found("ultralytics")).submodule_search_locations[0]
    module = sys.modules.get("ultralytics_losses")
    if module is None:
        source = Path(f"{path}/utils/loss.py").read_text()
        wanted = ("FocalLoss", "MultiChannelDiceLoss", "BCEDiceLoss", "SemanticSegmentationLoss")
        module = types.ModuleType("ultralytics_losses")
        module.__dict__.update(torch=torch, nn=torch.nn, F=F, CITYSCAPES_WEIGHT=(), Path=Path)
        for part in ("\n" + source).split("\nclass ")[1:]:
            if part.split("(")[0] in wanted:
                body = part.split("\ndef ")[0]
                exec(compile("from __future__ import annotations\nclass " + body, path, "exec"), module.__dict__)
        sys.modules["ultralytics_losses"] = module
    return module


class Wide:
    """torch, but what libraries do in float32 is done in float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def labels(kind, *, ignored=None, absent=None, share=0.3, classes=C, full=FULL):
    """Targets of the forms that the libraries take."""
    size = (N, *full)
    if kind == "classes":
        target = torch.randint(classes, size)
        if absent is not None:
            target = target.where(target != absent, 0)
    elif kind == "binary":
        target = torch.randint(2, size)[:, None]
    else:
        target = torch.randint(2, (N, classes, *full))
        if absent is not None:
            target[:, absent] = 0
    if ignored is not None:
        target = target.masked_fill(torch.rand(target.shape) < share, ignored)
    return target


def check(ours, theirs, target, classes=C, their_target=None, steep=3.0):
    """Values to 1e-10 and gradients to 1e-9 of the library's own on upsampled logits, NaN where it has NaN."""
    volume = tuple(target.shape[-3:]) == VOLUME
    x = (steep * torch.randn(N, classes, *(DEEP if volume else LOW), dtype=torch.float64)).requires_grad_()
    full = F.interpolate(x, target.shape[-3:], mode="trilinear") if volume else F.interpolate(x, FULL, mode="bilinear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs(full, target if their_target is None else their_target)
    got = ours(x, target)
    torch.testing.assert_close(got, want.to(torch.float64), rtol=1e-10, atol=1e-10, equal_nan=True)
    seed = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, x, seed) if want.requires_grad else (torch.zeros_like(x),)
    (got_grad,) = torch.autograd.grad(got, x, seed)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-9, atol=1e-9, equal_nan=True)
    return got
