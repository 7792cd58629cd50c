"""The losses of other libraries on volumes: against the libraries themselves, in float64."""

import sys

import pytest
import torch
from library_losses import VOLUME, WEIGHT, N, check, labels, monai, nnunet

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
