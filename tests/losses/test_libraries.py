"""The losses of other libraries: against the libraries themselves, in float64, on upsampled logits."""

import types

import pytest
import torch
import torch.nn.functional as F
from library_losses import FULL, LOW, WEIGHT, C, N, Wide, check, labels, monai, nnunet, smp, ultralytics

from fastseg import losses

SMP = [
    *((name, {"mode": "multiclass", **options}) for name in ("DiceLoss", "JaccardLoss", "TverskyLoss") for options in (
        {}, {"ignore_index": 255, "smooth": 0.5}, {"classes": [1, 3], "log_loss": True},
        {"class_weights": WEIGHT.tolist(), "ignore_index": 255}, {"class_weights": WEIGHT.tolist(), "classes": [0, 2]},
    )),
    ("TverskyLoss", {"mode": "multiclass", "alpha": 0.3, "beta": 0.7, "gamma": 1.5, "ignore_index": 255}),
    *((name, {"mode": mode, "ignore_index": 255, "smooth": 1.0}) for name in ("DiceLoss", "JaccardLoss")
      for mode in ("binary", "multilabel")),
    ("TverskyLoss", {"mode": "binary", "alpha": 0.3, "beta": 0.7}),
    ("FocalLoss", {"mode": "binary"}),
    ("FocalLoss", {"mode": "binary", "alpha": 0.3, "gamma": 1.5, "ignore_index": 255, "normalized": True}),
    ("FocalLoss", {"mode": "multiclass", "ignore_index": 255, "reduction": "sum", "reduced_threshold": 0.4}),
    ("FocalLoss", {"mode": "multiclass", "alpha": 0.25, "normalized": True, "reduction": "sum"}),
    ("FocalLoss", {"mode": "multiclass", "reduction": "batchwise_mean"}),
    ("FocalLoss", {"mode": "multiclass", "class_weights": WEIGHT.tolist(), "ignore_index": 255}),
    ("FocalLoss", {"mode": "multilabel", "gamma": 3.0}),
    ("SoftCrossEntropyLoss", {"smooth_factor": 0.1, "ignore_index": 255}),
    ("SoftCrossEntropyLoss", {"smooth_factor": 0.0, "ignore_index": None, "reduction": "sum"}),
    ("SoftBCEWithLogitsLoss", {}),
    ("SoftBCEWithLogitsLoss", {"smooth_factor": 0.1, "ignore_index": 255, "pos_weight": WEIGHT[:, None, None],
                               "weight": WEIGHT.flip(0)[:, None, None]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), SMP, ids=str)
def test_smp(name, options):
    theirs, ours = getattr(smp(), name)(**options), getattr(losses.smp, name)(**options)
    mode = options.get("mode", "multilabel" if name == "SoftBCEWithLogitsLoss" else "multiclass")
    kind = {"multiclass": "classes", "binary": "binary", "multilabel": "each"}[mode]
    classes = 1 if mode == "binary" else C
    ignored = options.get("ignore_index")
    for share, absent in ((0.3, None), (0.3, 2), (1.0, None)):
        if share == 1 and ignored is None:
            continue
        target = labels(kind, ignored=ignored, absent=absent, share=share, classes=classes)
        target = target.double() if kind != "classes" else target
        check(ours, theirs, target, classes)


def test_smp_values():
    """To the library's own, worked out by hand: two pixels, two classes, p = 1/2 everywhere."""
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    assert losses.smp.DiceLoss("multiclass")(logits, target).item() == pytest.approx(0.5)  # 2 * .5 / (1 + 1)
    assert losses.smp.JaccardLoss("multiclass")(logits, target).item() == pytest.approx(2 / 3)  # .5 / 1.5
    assert losses.smp.DiceLoss("multiclass")(logits, 0 * target).item() == pytest.approx((1 - 2 / 3) / 2)
    assert losses.smp.FocalLoss("multiclass")(logits, target).item() == pytest.approx(0.25 * 0.6931472)
    assert losses.smp.SoftBCEWithLogitsLoss(ignore_index=1)(logits[:, :1], target[:, None].float()).item() == (
        pytest.approx(0.6931472 / 2)
    )


MONAI_DICE = [
    {"softmax": True, "to_onehot_y": True},
    {"softmax": True, "to_onehot_y": True, "include_background": False, "squared_pred": True, "batch": True},
    {"softmax": True, "to_onehot_y": True, "jaccard": True, "reduction": "sum", "weight": WEIGHT.tolist()},
    {"softmax": True, "to_onehot_y": True, "reduction": "none", "ignore_index": 255},
    {"softmax": True, "to_onehot_y": True, "ignore_index": 1, "include_background": False},
    {"sigmoid": True, "smooth_nr": 0.0, "smooth_dr": 1e-3},
    {"sigmoid": True, "soft_label": True, "batch": True, "reduction": "none"},
    {"sigmoid": True, "ignore_index": 255},
    {"sigmoid": True, "ignore_index": 2},
]
MONAI = [
    *(("DiceLoss", options) for options in MONAI_DICE),
    ("TverskyLoss", {"softmax": True, "to_onehot_y": True, "alpha": 0.2, "beta": 0.9, "ignore_index": 255}),
    ("TverskyLoss", {"sigmoid": True, "reduction": "none", "include_background": False}),
    ("TverskyLoss", {"sigmoid": True, "batch": True, "reduction": "none"}),
    *(("GeneralizedDiceLoss", {"softmax": True, "to_onehot_y": True, "w_type": w, "batch": batch})
      for w, batch in (("square", False), ("simple", True), ("uniform", False))),
    ("GeneralizedDiceLoss", {"sigmoid": True, "include_background": False, "reduction": "none"}),
    ("FocalLoss", {"to_onehot_y": True}),
    ("FocalLoss", {"to_onehot_y": True, "use_softmax": True, "alpha": 0.3, "weight": WEIGHT.tolist()}),
    ("FocalLoss", {"to_onehot_y": True, "use_softmax": True, "include_background": False, "gamma": 1.5}),
    ("FocalLoss", {"to_onehot_y": True, "use_softmax": True, "include_background": False, "ignore_index": 255}),
    ("FocalLoss", {"alpha": [0.1, 0.2, 0.3, 0.4], "reduction": "sum", "include_background": True}),
    ("FocalLoss", {"to_onehot_y": True, "ignore_index": 255, "alpha": 0.25, "reduction": "sum"}),
    ("DiceCELoss", {"softmax": True, "to_onehot_y": True, "weight": WEIGHT, "lambda_ce": 0.5}),
    ("DiceCELoss", {"softmax": True, "to_onehot_y": True, "include_background": False, "label_smoothing": 0.1}),
    ("DiceCELoss", {"softmax": True, "squared_pred": True}),
    ("DiceFocalLoss", {"softmax": True, "to_onehot_y": True, "lambda_dice": 2.0, "gamma": 3.0}),
    ("GeneralizedDiceFocalLoss", {"sigmoid": True, "lambda_focal": 0.5}),
]  # fmt: skip


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "options"), MONAI, ids=str)
def test_monai(name, options):
    theirs, ours = getattr(monai(), name)(**options), getattr(losses.monai, name)(**options)
    classes = options.get("to_onehot_y", False)
    ignored = options.get("ignore_index")
    for share, absent in ((0.3, None), (0.3, 3), (1.0, None)):
        if share == 1 and ignored is None:
            continue
        if classes:
            target = labels("classes", ignored=ignored, absent=absent, share=share)[:, None]
        else:
            target = labels("each", absent=absent).double()
            target = target * (torch.rand(N, 1, *FULL) > share)
        check(ours, theirs, target, steep=1.5)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "TverskyLoss", "GeneralizedDiceLoss"])
def test_monai_of_one_channel(name):
    check(getattr(losses.monai, name)(sigmoid=True), getattr(monai(), name)(sigmoid=True),
          labels("binary").double(), 1)  # fmt: skip


def test_monai_values():
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]]]])
    options = {"softmax": True, "to_onehot_y": True, "smooth_nr": 0, "smooth_dr": 0}
    assert losses.monai.DiceLoss(**options)(logits, target).item() == pytest.approx(0.5)
    assert losses.monai.DiceLoss(**options, squared_pred=True)(logits, target).item() == pytest.approx(1 / 3)
    assert losses.monai.FocalLoss(to_onehot_y=True)(logits, target).item() == pytest.approx(0.25 * 0.6931472)
    assert losses.monai.GeneralizedDiceLoss(**options)(logits, target).item() == pytest.approx(0.5)
    assert losses.monai.DiceCELoss(**options)(logits, target).item() == pytest.approx(0.5 + 0.6931472)


NNUNET = [
    ("DC_and_CE_loss", ({"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}), {}),
    ("DC_and_CE_loss", ({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}),
     {"ignore_label": 3, "weight_ce": 0.5, "weight_dice": 2}),
    ("DC_and_CE_loss", ({"ddp": False, "clip_tp": 4.0}, {"label_smoothing": 0.1}), {"ignore_label": 3}),
    ("DC_and_topk_loss", ({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {"k": 10}), {}),
    ("DC_and_topk_loss", ({"ddp": False}, {"k": 30}), {"ignore_label": 3}),
    ("DC_and_BCE_loss", ({}, {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}), {}),
    ("DC_and_BCE_loss", ({}, {"do_bg": True, "ddp": False}), {"use_ignore_label": True}),
]  # fmt: skip


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "kwargs", "options"), NNUNET, ids=str)
def test_nnunet(name, kwargs, options):
    theirs = getattr(nnunet(), name)(*({**part} for part in kwargs), **options)
    ours = getattr(losses.nnunet, name)(*({**part} for part in kwargs), **options)
    for share in (0.3, 1.0):
        if name == "DC_and_BCE_loss":
            target = labels("each")
            if options:
                target = torch.cat([target, (torch.rand(N, 1, *FULL) < share).long()], 1)
            elif share == 1:
                continue
            check(ours, theirs, target.double(), C)
        else:
            ignored = options.get("ignore_label")
            target = labels("classes", ignored=ignored, absent=1, share=share if ignored else 0)[:, None]
            check(ours, theirs, target.double() if name != "DC_and_topk_loss" else target)


@pytest.mark.usefixtures("wide")
def test_nnunet_dice_with_a_mask():
    nnunet()
    from nnunetv2.training.loss import dice
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    target, mask = labels("classes")[:, None], torch.rand(N, 1, *FULL) > 0.4
    for name in ("SoftDiceLoss", "MemoryEfficientSoftDiceLoss"):
        for options in ({"batch_dice": True, "do_bg": False}, {"smooth": 0.1}):
            theirs = getattr(dice, name)(softmax_helper_dim1, ddp=False, **options)
            ours = getattr(losses.nnunet, name)(softmax_helper_dim1, ddp=False, **options)
            check(lambda x, y, ours=ours: ours(x, y, loss_mask=mask),
                  lambda x, y, theirs=theirs: theirs(x, y, loss_mask=mask), target)  # fmt: skip


def test_nnunet_values():
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]]]])
    dice = losses.nnunet.SoftDiceLoss(losses.nnunet.softmax_helper_dim1, smooth=0)
    assert dice(logits, target).item() == pytest.approx(-0.5)
    both = losses.nnunet.DC_and_CE_loss({"smooth": 0}, {}, ignore_label=1)
    assert both(logits, target).item() == pytest.approx(0.6931472 - (2 * 0.5 / 1.5 + 0) / 2)
    assert both(logits, 0 * target + 1).item() == pytest.approx(0, abs=1e-6)
    deep = losses.nnunet.DeepSupervisionWrapper(dice, [1, 0.5])
    assert deep([logits, logits], [target, target]).item() == pytest.approx(-0.75)
    topk = losses.nnunet.TopKLoss(k=50)
    assert topk(torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]]), target).item() == pytest.approx(4.0181499)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "options"), [
    ("MultiChannelDiceLoss", {}), ("MultiChannelDiceLoss", {"smooth": 1, "reduction": "sum"}),
    ("MultiChannelDiceLoss", {"reduction": "none"}), ("BCEDiceLoss", {"weight_bce": 0.3}), ("FocalLoss", {}),
    ("FocalLoss", {"gamma": 2.0, "alpha": 0.0}),
], ids=str)  # fmt: skip
def test_ultralytics(name, options):
    theirs = getattr(ultralytics(), name)(**options)
    check(getattr(losses.ultralytics, name)(**options), theirs, labels("each", absent=1).double())


@pytest.mark.parametrize("classes", [1, C])
def test_ultralytics_semantic_segmentation(classes, monkeypatch):
    library = ultralytics()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(library, "torch", Wide())
    model = torch.nn.Linear(1, 1).double()
    model.model, model.args, model.class_weights = [types.SimpleNamespace(nc=classes)], None, WEIGHT
    theirs, ours = library.SemanticSegmentationLoss(model), losses.ultralytics.SemanticSegmentationLoss(model)
    auxiliary = torch.randn(N, classes, 4, 4, dtype=torch.float64)
    for share in (0.3, 1.0):
        target = labels("classes" if classes > 1 else "binary", ignored=255, share=share)
        target = target.view(N, *FULL)
        total = lambda loss: lambda logits, y: loss((logits, auxiliary), {"semantic_mask": y})[0]
        check(total(ours), total(theirs), target, classes)
        x, batch = torch.randn(N, classes, *LOW, dtype=torch.float64), {"semantic_mask": target}
        full = F.interpolate(x, FULL, mode="bilinear")
        parts = ours((x, auxiliary), batch)[1]
        for name, want in theirs((full, auxiliary), batch)[1].items():
            torch.testing.assert_close(parts[name], want.double(), rtol=1e-10, atol=1e-10)


def test_ultralytics_values():
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
    assert losses.ultralytics.MultiChannelDiceLoss(smooth=0)(logits, target).item() == pytest.approx(0.5)
    assert losses.ultralytics.BCEDiceLoss()(logits, target).item() == pytest.approx(0.5 * (0.6931472 + 1 / 3))
    focal = losses.ultralytics.FocalLoss(gamma=2.0, alpha=0.25)
    assert focal(logits, target).item() == pytest.approx(2 * 0.25 * 0.6931472 * 0.5)
