"""The losses of other libraries on volumes: against the libraries themselves, in float64."""

import sys
import types

import pytest
import torch
from library_losses import DEEP, VOLUME, WEIGHT, C, N, check, labels, monai, nnunet, smp, ultralytics

from fastseg import losses

OF_VOLUMES = [
    ("DiceLoss", {"softmax": True, "to_onehot_y": True, "reduction": "none", "ignore_index": 255}),
    ("DiceCELoss", {"softmax": True, "to_onehot_y": True, "weight": WEIGHT, "label_smoothing": 0.1}),
    ("DiceCELoss", {"softmax": True, "squared_pred": True}),
    ("DiceFocalLoss", {"softmax": True, "to_onehot_y": True}),
    ("FocalLoss", {"to_onehot_y": True, "use_softmax": True, "include_background": False, "ignore_index": 255}),
    ("GeneralizedDiceLoss", {"sigmoid": True, "include_background": False, "reduction": "none"}),
    ("TverskyLoss", {"sigmoid": True, "ignore_index": 2}),
    ("DC_and_CE_loss", {"ignore_label": 3}), ("DC_and_CE_loss", {}), ("DC_and_topk_loss", {}),
    ("DC_and_BCE_loss", {"use_ignore_label": True}),
]  # fmt: skip


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "options"), OF_VOLUMES, ids=str)
def test_volumes(name, options, monkeypatch):
    """The two libraries of volumes, on logits of (N, C, d, h, w); a slab is one slice."""
    monkeypatch.setattr(sys.modules["fastseg.ops.volume_loss"], "SLAB", 1)
    parts, ignored = (), options.get("ignore_index", options.get("ignore_label"))
    if name.startswith("DC"):
        dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
        entropy = {"k": 30} if "topk" in name else {}
        parts = (entropy, dice) if "BCE" in name else (dice, entropy)
    library, own = (nnunet, losses.nnunet) if parts else (monai, losses.monai)
    theirs, ours = (getattr(of, name)(*({**part} for part in parts), **options) for of in (library(), own))
    if options.get("to_onehot_y") or (parts and "BCE" not in name):
        target = labels("classes", ignored=ignored, absent=1, full=VOLUME)[:, None]
    else:
        target = labels("each", full=VOLUME).double()
        if "BCE" in name:
            target = torch.cat([target, (torch.rand(N, 1, *VOLUME) < 0.3).double()], 1)
    check(ours, theirs, target, steep=1.5)


SMP_OF_VOLUMES = [
    ("DiceLoss", {"mode": "multiclass", "class_weights": WEIGHT.tolist(), "ignore_index": 255}),
    ("JaccardLoss", {"mode": "multilabel", "ignore_index": 255, "log_loss": True}),
    ("TverskyLoss", {"mode": "binary", "alpha": 0.3, "beta": 0.7}),
    ("FocalLoss", {"mode": "multiclass", "alpha": 0.3, "normalized": True, "ignore_index": 255}),
    ("SoftCrossEntropyLoss", {"smooth_factor": 0.1, "ignore_index": 255}),
    ("SoftBCEWithLogitsLoss", {"smooth_factor": 0.1, "pos_weight": WEIGHT[:, None, None, None]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), SMP_OF_VOLUMES, ids=str)
def test_smp_of_volumes(name, options, monkeypatch):
    monkeypatch.setattr(sys.modules["fastseg.ops.volume_loss"], "SLAB", 1)
    theirs, ours = getattr(smp(), name)(**options), getattr(losses.smp, name)(**options)
    mode = options.get("mode", "multilabel" if name == "SoftBCEWithLogitsLoss" else "multiclass")
    kind = {"multiclass": "classes", "binary": "binary", "multilabel": "each"}[mode]
    classes = 1 if mode == "binary" else C
    target = labels(kind, ignored=options.get("ignore_index"), absent=None if mode == "binary" else 2,
                    classes=classes, full=VOLUME)  # fmt: skip
    check(ours, theirs, target if kind == "classes" else target.double(), classes)


@pytest.mark.usefixtures("wide")
def test_ultralytics_of_volumes():
    check(losses.ultralytics.FocalLoss(), ultralytics().FocalLoss(), labels("each", full=VOLUME).double())


@pytest.mark.parametrize("loss", ["MultiChannelDiceLoss", "BCEDiceLoss", "SemanticSegmentationLoss"])
def test_ultralytics_losses_that_take_no_volumes(loss):
    model = types.SimpleNamespace(model=[types.SimpleNamespace(nc=C)])
    arguments = (model,) if loss == "SemanticSegmentationLoss" else ()
    target = labels("classes" if arguments else "each", full=VOLUME)
    target = {"semantic_mask": target} if arguments else target.double()
    with pytest.raises(ValueError, match=rf"{loss}: too many values to unpack \(expected 4\): .* \(2, 4, 2, 3, 2\)"):
        getattr(losses.ultralytics, loss)(*arguments)(torch.randn(N, C, *DEEP), target)
