"""nnU-Net's export beside its own function, on random logits: equal but where two of them are nearly equal."""

import functools
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastseg.integrations import nnunet


def test_the_nearest_slice_is_the_one_of_scipy_and_of_torch():
    scipy = pytest.importorskip("scipy.ndimage")
    for depth, full in ((3, 8), (8, 3), (5, 5), (7, 24), (1, 4), (11, 10)):
        source = depth / full * (np.arange(full) + 0.5) - 0.5
        want = scipy.map_coordinates(np.arange(depth, dtype=float), [source], order=0, mode="nearest")
        assert nnunet.nearest_as_scipy(depth, full) == want.astype(int).tolist()
        want = F.interpolate(torch.arange(depth).float()[None, None], size=full, mode="nearest-exact")
        assert nnunet.nearest_as_torch(depth, full) == want[0, 0].long().tolist()


def test_without_nnunet_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2.inference.export_prediction", None)
    with pytest.raises(ImportError, match="needs nnunetv2: pip install nnunetv2"):
        nnunet.install()


DEFAULT = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
TORCH = {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False}


def case(K, low, full, spacing, plan, *, fn="resample_data_or_seg_to_shape", dtype=torch.float32, **options):
    """The arguments of the export of K logits of shape ``low`` to a crop ``full`` of an image 2 + 3 voxels larger."""
    handler = pytest.importorskip("nnunetv2.utilities.plans_handling.plans_handler")
    labels = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    forward, backward = (2, 0, 1), (1, 2, 0)
    given = [0.0, 0.0, 0.0]
    for i, axis in enumerate(forward):
        given[axis] = spacing[i]
    keywords = DEFAULT if fn == "resample_data_or_seg_to_shape" else TORCH
    configuration = handler.ConfigurationManager({
        "architecture": {}, "spacing": plan,
        "resampling_fn_probabilities": fn, "resampling_fn_probabilities_kwargs": keywords | options,
    })  # fmt: skip
    properties = {
        "spacing": given, "shape_after_cropping_and_before_resampling": full,
        "shape_before_cropping": [n + 5 for n in full], "bbox_used_for_cropping": [[2, n + 2] for n in full],
    }  # fmt: skip
    plans = SimpleNamespace(transpose_forward=forward, transpose_backward=backward)
    label_manager = labels.LabelManager({"background": 0} | {f"l{i}": i for i in range(1, K)}, None)
    torch.manual_seed(0)
    return torch.randn(K, *low).to(dtype), plans, configuration, label_manager, properties


ONE, THICK = [1.0, 1.0, 1.0], [5.0, 1.0, 1.0]
CASES = {
    "linear": lambda: case(4, (6, 7, 8), (11, 12, 17), ONE, [2.0, 1.7, 2.1]),
    "two": lambda: case(2, (6, 7, 8), (11, 12, 17), ONE, [2.0, 1.7, 2.1]),
    "smaller": lambda: case(4, (9, 12, 8), (5, 8, 5), ONE, [0.6, 0.7, 0.6]),
    "separate": lambda: case(4, (6, 7, 8), (14, 12, 17), THICK, [9.0, 1.7, 2.1]),
    "separate, fewer": lambda: case(2, (9, 7, 8), (5, 12, 17), THICK, [3.0, 1.7, 2.1]),
    "separate, last axis": lambda: case(4, (6, 7, 4), (12, 12, 9), [1.0, 1.0, 5.0], [2.0, 2.0, 11.0]),
    "separate, middle axis": lambda: case(4, (6, 4, 7), (12, 9, 12), [1.0, 5.0, 1.0], [2.0, 11.0, 2.0]),
    "linear out of the plane": lambda: case(4, (6, 7, 8), (14, 12, 17), THICK, [9.0, 1.7, 2.1], order_z=1),
    "forced together": lambda: case(4, (6, 7, 8), (14, 12, 17), THICK, [9.0, 1.7, 2.1], force_separate_z=False),
    "no resampling": lambda: case(4, (6, 7, 8), (6, 7, 8), ONE, ONE),
    "plane alone": lambda: case(4, (6, 7, 8), (6, 12, 17), THICK, [5.0, 2.0, 2.0]),
    "slices": lambda: case(4, (6, 7, 8), (6, 12, 17), THICK, [2.0, 2.0]),
    "half": lambda: case(4, (6, 7, 8), (11, 12, 17), ONE, [2.0, 1.7, 2.1], dtype=torch.float16),
    "300 labels": lambda: case(300, (2, 3, 3), (3, 5, 4), ONE, [2.0, 1.7, 2.1]),
    "torch": lambda: case(4, (6, 7, 8), (11, 12, 17), ONE, [2.0, 1.7, 2.1], fn="resample_torch_fornnunet"),
    "torch, separate": lambda: case(4, (6, 7, 8), (14, 12, 17), THICK, [9.0, 1.7, 2.1], fn="resample_torch_fornnunet"),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_nnunets_own(name, recwarn):
    arguments = CASES[name]()
    logits, plans, configuration, _, properties = arguments
    ours = nnunet.convert_logits(*arguments, num_threads_torch=1)
    assert not [w for w in recwarn if "nnunetv2's own function" in str(w.message)]
    theirs = nnunet.nnunets_own()[nnunet.CONVERT](*arguments, num_threads_torch=1)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    apart = ours != theirs
    assert apart.mean() < 0.01
    if apart.any():  # the two logits, resampled in float64, are nearly equal
        full = configuration.resampling_fn_probabilities(
            logits.numpy().astype(float), properties["shape_after_cropping_and_before_resampling"],
            configuration.spacing, [properties["spacing"][i] for i in plans.transpose_forward],
        )  # fmt: skip
        place = np.stack(list(full)).transpose(0, 2, 3, 1)
        inner = (slice(None), *(slice(2, n + 2) for n in place.shape[1:]))
        a, b = (np.take_along_axis(place, x[inner[1:]][None].astype(int), 0)[0] for x in (ours, theirs))
        assert np.abs(a - b).max() < (1e-5 if logits.dtype == torch.float32 else 4e-3)
        assert (a >= b - 1e-6).all()


def test_a_box_that_leaves_the_image():
    arguments = CASES["linear"]()
    arguments[-1]["bbox_used_for_cropping"] = [[-2, 9], [8, 20], [2, 19]]
    ours = nnunet.convert_logits(*arguments)
    np.testing.assert_array_equal(ours, nnunet.nnunets_own()[nnunet.CONVERT](*arguments))
    assert ours.any()


@pytest.mark.parametrize(("change", "why"), [
    ({"order": 3}, "resampling of order 3, out of the plane 0"),
    ({"is_seg": True}, "resampling of order 1"),
    ({"fn": "resample_torch_fornnunet", "aniso_axis_mode": "linear"}, "out of the plane 'linear'"),
    ({"fn": "resample_torch_simple"}, "the resampling is resample_torch_simple"),
], ids=str)  # fmt: skip
def test_what_is_left_to_nnunets_own(change, why):
    _, _, configuration, labels, properties = case(3, (3, 4, 4), (5, 6, 7), ONE, [2.0, 1.7, 2.1], **change)
    assert why in nnunet.refuses(configuration, labels, properties)


def test_probabilities_and_regions_are_nnunets_own(monkeypatch):
    arguments = CASES["linear"]()
    with pytest.warns(UserWarning, match="nnunetv2's own function exports: probabilities are asked for"):
        classes, probabilities = nnunet.convert_logits(*arguments, return_probabilities=True)
    assert probabilities.shape == (4, *classes.shape)
    monkeypatch.setattr(type(arguments[3]), "has_regions", True)
    assert nnunet.refuses(*arguments[2:]) == "its labels are regions"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="3 logits for 4 labels"):
        nnunet.convert_logits(arguments[0][:3], *arguments[1:])


def test_switch(tmp_path, monkeypatch):
    export = pytest.importorskip("nnunetv2.inference.export_prediction")
    predict = pytest.importorskip("nnunetv2.inference.predict_from_raw_data")
    own = export.export_prediction_from_logits
    with nnunet.installed():
        assert predict.export_prediction_from_logits is nnunet.export_prediction_from_logits
        assert getattr(export, nnunet.CONVERT) is nnunet.convert_logits
        assert pickle.loads(pickle.dumps(predict.export_prediction_from_logits)) is nnunet.export_prediction_from_logits
        with nnunet.installed():
            pass
        assert predict.export_prediction_from_logits is nnunet.export_prediction_from_logits
    assert predict.export_prediction_from_logits is export.export_prediction_from_logits is own

    logits, plans, configuration, labels, properties = CASES["separate"]()
    calls, written = [], []
    monkeypatch.setattr(nnunet, "converted", functools.partial(_counted, calls, nnunet.converted))
    plans.get_label_manager = lambda dataset: labels
    plans.image_reader_writer_class = lambda: SimpleNamespace(write_seg=lambda *a: written.append(a))
    nnunet.export_prediction_from_logits(logits, properties, configuration, plans, {"file_ending": ".nii"}, "out")
    assert len(calls) == 1 and written[0][1] == "out.nii"
    np.testing.assert_array_equal(written[0][0], nnunet.nnunets_own()[nnunet.CONVERT](*CASES["separate"]()))


def _counted(calls, function, *args):
    calls.append(args)
    return function(*args)
