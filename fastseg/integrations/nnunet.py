"""nnU-Net's export of a prediction, without the resampled logits.

nnunetv2 resamples the logits (K, d, h, w) of all classes to the image's shape, takes the argmax, undoes the crop and
the transposition. ``convert_logits`` does the same a few slices at a time and writes the classes straight to their
place. It resamples as nnunetv2 2.8 does with its default plans and with those of its torch resampling: linearly, and
where the spacing is anisotropic linearly in the plane and to the nearest slice out of it.

Its result equals nnunetv2's but where two logits are nearly equal: nnunetv2 rounds resampled logits to the dtype of the
prediction (its predictor hands over float16), fastseg compares them in float32.

    >>> fastseg.integrations.nnunet.install()  # doctest: +SKIP
    >>> predictor.predict_from_files(...)  # doctest: +SKIP

What is not done here goes to nnunetv2's own function, with a warning that says why: other orders of interpolation,
labels of regions, probabilities.

Source: github.com/MIC-DKFZ/nnUNet (nnunetv2/inference/export_prediction.py, nnunetv2/preprocessing/resampling).
"""

import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastseg.ops.core.volume import Resize, Slices
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.volume_argmax import volume_on_cpu

CONVERT = "convert_predicted_logits_to_segmentation_with_correct_shape"
EXPORT = "export_prediction_from_logits"
_lock = threading.RLock()
_own: dict[str, Any] = {}  # nnunetv2's functions by name, while ours are in their place


def convert_logits(
    predicted_logits: Tensor | np.ndarray,
    plans_manager: Any,
    configuration_manager: Any,
    label_manager: Any,
    properties_dict: dict,
    return_probabilities: bool = False,
    num_threads_torch: int | None = None,
) -> Any:
    """nnunetv2's ``convert_predicted_logits_to_segmentation_with_correct_shape``: logits to the image's class volume.

    Args:
        predicted_logits: (K, d, h, w), as the network gave them.
        plans_manager: nnunetv2's ``PlansManager``.
        configuration_manager: its ``ConfigurationManager``, whose plan names the resampling.
        label_manager: its ``LabelManager``.
        properties_dict: what its preprocessor noted of the image: spacing, shapes before and after cropping, the box.
        return_probabilities: return (classes, probabilities); nnunetv2's own function then computes both.
        num_threads_torch: threads inside the call; None: nnunetv2's default.

    Returns:
        Classes as the image lies, uint8, or uint16 from 255 foreground labels on.

    Raises:
        ImportError: nnunetv2 is not installed.
        ValueError: the number of logits is not that of the labels.
    """
    theirs = nnunets_own()
    if num_threads_torch is None:
        num_threads_torch = importlib.import_module("nnunetv2.configuration").default_num_processes
    arguments = (predicted_logits, plans_manager, configuration_manager, label_manager, properties_dict)
    why = refuses(configuration_manager, label_manager, properties_dict, return_probabilities)
    if why:
        warnings.warn(f"fastseg.integrations.nnunet: nnunetv2's own function exports: {why}", stacklevel=2)
        return theirs[CONVERT](*arguments, return_probabilities, num_threads_torch)
    heads = label_manager.num_segmentation_heads
    if len(predicted_logits) != heads:
        raise ValueError(f"convert_logits: {len(predicted_logits)} logits for {heads} labels; give (labels, d, h, w)")
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads_torch)
    try:
        return converted(predicted_logits, plans_manager, configuration_manager, label_manager, properties_dict)
    finally:
        torch.set_num_threads(threads)


def refuses(
    configuration_manager: Any, label_manager: Any, properties_dict: dict, return_probabilities: bool = False
) -> str:
    """Why ``convert_logits`` leaves this export to nnunetv2's own function, or ""."""
    manager = importlib.import_module("nnunetv2.utilities.label_handling.label_handling").LabelManager
    names = ("convert_logits_to_segmentation", "convert_probabilities_to_segmentation")
    if return_probabilities:
        return "probabilities are asked for"
    if label_manager.has_regions:
        return "its labels are regions"
    if any(getattr(type(label_manager), name) is not getattr(manager, name) for name in names):
        return f"{type(label_manager).__name__} has its own rule for the class"
    if len(properties_dict["shape_after_cropping_and_before_resampling"]) != 3:
        return "the image is not a volume"
    return _resampling(configuration_manager)[1]


def export_prediction_from_logits(*args: Any, **kwargs: Any) -> None:
    """nnunetv2's function of this name, with ``convert_logits`` inside; worker processes find it by its name here."""
    with installed():
        nnunets_own()[EXPORT](*args, **kwargs)


def install() -> None:
    """Put ``convert_logits`` and the export in the place of nnunetv2's own, in this process and in those it starts.

    Modules of nnunetv2 that are imported later take them too. A second call changes nothing.

    Raises:
        ImportError: nnunetv2 is not installed.
    """
    with _lock:
        own = nnunets_own()
        if not _own:
            _own.update(own)
            _replace({id(own[CONVERT]): convert_logits, id(own[EXPORT]): export_prediction_from_logits})


def uninstall() -> None:
    """Put nnunetv2's own functions back."""
    with _lock:
        if _own:
            _replace({id(convert_logits): _own[CONVERT], id(export_prediction_from_logits): _own[EXPORT]})
            _own.clear()


@contextmanager
def installed() -> Iterator[None]:
    """``install()`` for a block; what was installed before stays."""
    with _lock:
        before = bool(_own)
        install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def nnunets_own() -> dict[str, Any]:
    """nnunetv2's own functions, whether or not ours are in their place."""
    try:
        module = importlib.import_module("nnunetv2.inference.export_prediction")
    except ImportError as error:
        raise ImportError(f"fastseg.integrations.nnunet needs nnunetv2: pip install nnunetv2 ({error})") from error
    return dict(_own) or {name: getattr(module, name) for name in (CONVERT, EXPORT)}


def _replace(by_identity: dict[int, Any]) -> None:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "nnunetv2":
            for attribute in (CONVERT, EXPORT):
                held = vars(module).get(attribute)
                if id(held) in by_identity:
                    setattr(module, attribute, by_identity[id(held)])


def _resampling(configuration_manager: Any) -> tuple[dict, str]:
    """The options of the plan's resampling, and why we do not do it, or ""."""
    call = configuration_manager.resampling_fn_probabilities
    if not isinstance(call, functools.partial) or call.args:
        return {}, f"the resampling is {call!r}"
    room = "nnunetv2.preprocessing.resampling"
    default = importlib.import_module(f"{room}.default_resampling").resample_data_or_seg_to_shape
    with_torch = importlib.import_module(f"{room}.resample_torch").resample_torch_fornnunet
    no_matter = ("num_threads", "device", "memefficient_seg_resampling")
    given = {k: v for k, v in call.keywords.items() if k not in no_matter}
    options = {"force_separate_z": None, "separate_z_anisotropy_threshold": _threshold(), "is_seg": False}
    if call.func is default:
        options |= {"force_separate_z": False, "order": 3, "order_z": 0} | given
        done = options["order"] == 1 and options["order_z"] in (0, 1)
        said = f"resampling of order {options['order']}, out of the plane {options['order_z']}"
    elif call.func is with_torch:
        options |= {"mode": "linear", "aniso_axis_mode": "nearest-exact"} | given
        done = options["mode"] == "linear" and options["aniso_axis_mode"] == "nearest-exact"
        said = f"resampling in mode {options['mode']!r}, out of the plane {options['aniso_axis_mode']!r}"
    else:
        return {}, f"the resampling is {getattr(call.func, '__name__', call.func)}"
    return options, "" if done and not options["is_seg"] else said


def _threshold() -> float:
    return importlib.import_module("nnunetv2.configuration").ANISO_THRESHOLD


def converted(logits: Any, plans: Any, configuration: Any, labels: Any, properties: dict) -> np.ndarray:
    shape = [int(n) for n in properties["shape_after_cropping_and_before_resampling"]]
    spacing = [properties["spacing"][i] for i in plans.transpose_forward]
    current = list(configuration.spacing)
    if len(current) != len(shape):  # a plan of 2-D slices
        current = [spacing[0], *current]
    kind = np.uint8 if len(labels.foreground_labels) < 255 else np.uint16
    classes = np.zeros([int(n) for n in properties["shape_before_cropping"]], dtype=kind)
    box = [(int(a), int(b)) for a, b in properties["bbox_used_for_cropping"]]
    inside = all(a >= 0 and b <= n and b - a == m for (a, b), n, m in zip(box, classes.shape, shape, strict=True))
    crop = classes[tuple(slice(a, b) for a, b in box)] if inside else np.zeros(shape, dtype=kind)
    volume = torch.as_tensor(logits).detach().cpu()
    _resample(volume, torch.from_numpy(crop), _separate_axis(configuration, current, spacing), configuration)
    if not inside:
        insert = importlib.import_module("acvl_utils.cropping_and_padding.bounding_boxes").insert_crop_into_image
        classes = insert(classes, crop, properties["bbox_used_for_cropping"])
    return classes.transpose(plans.transpose_backward)


def _separate_axis(configuration: Any, current: Sequence[float], spacing: Sequence[float]) -> int | None:
    """The axis that nnunetv2 resamples by itself, or None."""
    module = importlib.import_module("nnunetv2.preprocessing.resampling.default_resampling")
    options = _resampling(configuration)[0]
    force, threshold = options["force_separate_z"], options["separate_z_anisotropy_threshold"]
    separate, axis = module.determine_do_sep_z_and_axis(force, current, spacing, threshold)
    return int(axis) if separate else None


def _resample(logits: Tensor, out: Tensor, axis: int | None, configuration: Any) -> None:
    """Classes (D, H, W) of logits (K, d, h, w) into ``out``."""
    if axis is None or _resampling(configuration)[0].get("order_z") == 1:
        D, H, W = out.shape
        upsample_argmax(logits[None], (D, H, W), out=out[None])
        return
    logits, out = logits.movedim(axis + 1, 1), out.movedim(axis, 0)
    depth, (D, H, W) = logits.shape[1], out.shape
    exact = "aniso_axis_mode" in _resampling(configuration)[0]
    nearest = (nearest_as_torch if exact else nearest_as_scipy)(depth, D)
    to = Resize((D, H, W), (0.0, 0.0, 0.0), False)
    volume_on_cpu(logits[None], to, out[None], Slices(nearest, nearest, [0.0] * D))


def nearest_as_scipy(depth: int, full: int) -> list[int]:
    """The slice that ``scipy.ndimage.map_coordinates`` of order 0 takes for each output slice."""
    source = float(depth) / full * (np.arange(full) + 0.5) - 0.5
    return np.floor(source + 0.5).clip(0, depth - 1).astype(int).tolist()


def nearest_as_torch(depth: int, full: int) -> list[int]:
    """The slice that torch's mode "nearest-exact" takes."""
    planes = torch.arange(depth, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(planes, size=full, mode="nearest-exact")[0, 0].long().tolist()
