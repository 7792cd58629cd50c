"""Write a model as a file that other programs run: ONNX, or an AOTInductor package."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastseg.exporting.answer import NAMES, OUTPUTS, Answer, Output
from fastseg.exporting.onnx_file import onnx_bytes, open_onnx, packages_missing, runtime_missing
from fastseg.exporting.package_file import open_package, write_package
from fastseg.exporting.preprocessing import Preprocessing
from fastseg.exporting.trace import MORE, larger, traced
from fastseg.io.files import atomic_write, look_at_folder, make_folder
from fastseg.nn.modes import evaluating

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-3  # of a logit over the largest, and of a probability: other orders of sums
DIFFERENT = 5e-3  # share of pixels whose class may differ: near-ties


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        output: "logits", "classes" or "confidence".
        free: those of "batch", "height" and "width" that may differ from the example's.
        why: why the others may not, or "".
        checked: how far the file's answers lie from torch's, or why nothing was compared.
    """

    path: Path
    output: str
    free: tuple[str, ...]
    why: str
    checked: str

    def __str__(self) -> str:
        free = ", ".join(self.free) or "none"
        return f"{self.path}: {self.output}; free sizes: {free}{f' ({self.why})' * bool(self.why)}; {self.checked}"


def export(
    model: nn.Module,
    path: str | Path,
    *,
    example: Tensor,
    output: Output = "logits",
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    check: bool = True,
) -> Exported:
    """Write ``model`` as a file that runs without fastseg, by its suffix.

    ``.onnx``: an ONNX file without custom operators, for onnxruntime, OpenVINO or TensorRT. ``.pt2``: a package of
    AOTInductor for the example's device, which C++ runs without Python. Both hold the final resize and, for "classes"
    and "confidence", the argmax. Input and outputs are named "image", and "logits", or "classes" and "confidence".
    Batch, height and width are free where the model allows it. The metadata hold ``output``, ``classes``,
    ``preprocessing``, ``free`` and ``producer``, each as JSON.

    The model is exported in evaluation mode and without gradients; it keeps its mode. Where the logits have another
    size than the picture they are interpolated to it, as ``fastseg.predict`` does.

    Args:
        model: any whose output holds logits, as for ``fastseg.predict``.
        path: ends in ``.onnx`` or ``.pt2``; it is replaced only by a whole, checked file.
        example: (N, C, H, W), as the model takes it, on the model's device.
        output: "logits" (N, C, H, W); "classes" (N, H, W), uint8 up to 256 classes, else int32; "confidence": these,
            and the probability of each pixel's class (N, H, W), float32. One channel is class 1 where it is above 0.
        preprocessing: is recorded; with its ``apply`` the file computes it, and takes pictures (N, H, W, C), uint8.
        classes: their names, recorded; default: "0", "1", ...
        check: compare the file's answers with torch's, on the example and, where sizes are free, on another; ``.onnx``
            in onnxruntime if that is installed.

    Returns:
        ``Exported``; its ``str`` is one line.

    Raises:
        TypeError: ``example`` is no tensor, or the model returns no logits.
        ValueError: the suffix, output, example or names do not fit; the model cannot be traced; the format lacks an
            operator; or the file's answers differ from torch's.
        ImportError: onnx or onnxscript is not installed.
        OSError: the path cannot be written.
    """
    path = checked_path(path)
    if output not in OUTPUTS:
        raise ValueError(f"export: output is {output!r}; use one of {', '.join(OUTPUTS)}")
    if not isinstance(example, Tensor):
        raise TypeError(
            f"export: example is a {type(example).__name__}; give a tensor (N, C, H, W) that the model takes"
        )
    if example.dim() != 4 or not example.is_floating_point() or example.numel() == 0:
        raise ValueError(
            f"export: example is {tuple(example.shape)} {example.dtype}; give (N, C, H, W), floating point"
        )
    make_folder(path.parent, (path.name,))
    with evaluating(model), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        answer = Answer(model, output, preprocessing, example).eval()
        if preprocessing is not None and len(preprocessing.mean) != example.shape[1]:
            raise ValueError(f"export: mean is {preprocessing.mean}, the example has {example.shape[1]} channels")
        names = [str(index) for index in range(answer.classes)] if classes is None else list(classes)
        if len(names) != answer.classes:
            raise ValueError(f"export: {len(names)} names of classes, the model has {answer.classes}")
        graph = traced(answer, answer.input_like(example))
        facts = {"producer": "fastseg", "output": output, "classes": names, "free": graph.free,
                 "preprocessing": None if preprocessing is None else preprocessing.facts()}  # fmt: skip
        words = {name: json.dumps(value) for name, value in facts.items()}
        made = Path(folder) / path.name
        if path.suffix == ".onnx":
            made.write_bytes(onnx_bytes(graph, output, words))
        else:
            write_package(graph, made, words)
        checked = _checked(answer, made, example, graph.free) if check else "not checked"
        with atomic_write(path) as file:
            file.write(made.read_bytes())
    return Exported(path, output, graph.free, graph.why, checked)


def checked_path(path: str | Path) -> Path:
    """The path, if a file of this kind can be written there.

    Raises:
        ValueError: its suffix is of no format.
        ImportError: what writes the format is not installed.
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export: {path} ends in {path.suffix or 'no suffix'!r}; use {' or '.join(SUFFIXES)}")
    if path.suffix == ".onnx" and packages_missing():
        raise ImportError(f"export: {packages_missing()} not installed: pip install fastseg-kernels[onnx]")
    look_at_folder(path.parent, (path.name,))
    return path


def _checked(answer: Answer, made: Path, example: Tensor, free: Sequence[str]) -> str:
    """Run the file beside torch; the remark for ``Exported``.

    Raises:
        ValueError: the answers differ.
    """
    if made.suffix == ".onnx" and runtime_missing():
        return "not checked: onnxruntime is not installed"
    run = open_onnx(made)[0] if made.suffix == ".onnx" else open_package(made)[0]
    largest = 0.0
    x, places = answer.input_like(example), [answer.axes[name] for name in free]
    for given in (x, larger(x, places), larger(x, places, MORE + 1)) if places else (x,):
        try:
            want = answer(given)
        except Exception:  # a size that the model refuses, such as one that its stride does not divide
            continue
        wants = want if isinstance(want, tuple) else (want,)
        for name, got, true in zip(NAMES[answer.output], run(given), wants, strict=True):
            largest = max(largest, _distance(name, got, true, tuple(given.shape)))
    runtime = "onnxruntime" if made.suffix == ".onnx" else "AOTInductor"
    return f"{runtime}'s answers lie within {largest:.1e} of torch's"


def _distance(name: str, got: Tensor, want: Tensor, shape: tuple[int, ...]) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(
            f"export: at {shape} the file's {name} are {tuple(got.shape)} {got.dtype}, torch's "
            f"{tuple(want.shape)} {want.dtype}; nothing was written"
        )
    if name == "classes":
        distance, limit, unit = (got != want).double().mean().item(), DIFFERENT, "of the pixels"
    else:
        scale = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny).item()
        distance, limit, unit = (got - want).abs().max().item() / scale, TOLERANCE, "of the largest"
    if not distance <= limit:
        raise ValueError(
            f"export: at {shape} the file's {name} differ from torch's by {distance:.1e} {unit}; nothing was written"
        )
    return distance
