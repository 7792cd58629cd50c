"""Print the launches of every model's eval forward, eager and ours, counted without a GPU.

    python -m benchmarks.studies.launches

The forward runs on the CPU with the decisions of CUDA: kernels are counted, not run, convolutions give maps that nobody
computed, and cuDNN's fused call is one launch. Every op of torch that makes or writes a tensor is one launch; views and
uninitialised memory are none; a convolution's bias is a second one, as torch adds it on CUDA. Of copies that cuDNN
makes inside a call nothing is known.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: CPU tensors then take the kernels' path

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

import fastseg
from benchmarks.bench_models import CREATED
from fastseg.kernels.runtime.launch import intercept
from fastseg.measure.comparison import eager_form
from fastseg.models import create
from fastseg.ops import conv_act as _conv_act

NO_LAUNCH = (
    "_unsafe_view",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_efficientzerotensor",
)


class _Launches(TorchDispatchMode):
    """Counts what would run on CUDA; registered ops of ours are looked into."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastseg":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "convolution":
            self.counts["convolution"] += 1
            self.counts["bias of a convolution"] += args[2] is not None
            return _like_convolution(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor | tuple | list) and _writes(func) and name not in NO_LAUNCH:
            self.counts[name] += len(args[0]) if name.startswith("_foreach") else 1
        return out


def _writes(func) -> bool:
    """Whether the op makes or writes a tensor; else it is a view, or reads a number."""
    views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
    return not views or not all(views)


def _like_convolution(func, args, kwargs) -> Tensor:
    """A map of the shape and strides that the convolution would give."""
    last = args[0].is_contiguous(memory_format=torch.channels_last)
    with _disable_current_modes():
        meta_args, meta_kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        y = func(*meta_args, **meta_kwargs)
        format = torch.channels_last if last else torch.contiguous_format
        return torch.empty(y.shape, dtype=y.dtype, memory_format=format).zero_()


ON_CUDA = {"device": "cuda", "cudnn": True, "deterministic": False}  # what a request says there


@contextmanager
def count() -> Iterator[Counter[str]]:
    """Count the launches inside the block by kernel or op; ``.total()`` is their number."""
    counts: Counter[str] = Counter()
    request_of = _conv_act.request_of

    def on_launch(kernel, *_) -> None:
        counts[kernel.fn.__name__] += 1

    def fused(x, weight, bias, *options) -> Tensor:
        counts["cudnn_convolution_relu"] += 1
        args = (x, weight, bias, *options[:3], False, (0, 0), options[3])
        return _like_convolution(torch.ops.aten.convolution.default, args, {})

    def fused_add(x, weight, z, alpha, bias, *options) -> Tensor:
        return fused(x, weight, bias, *options)

    as_on_cuda = (
        mock.patch.object(_conv_act, "request_of", lambda *a, **k: request_of(*a, **k)._replace(**ON_CUDA)),
        mock.patch.object(torch, "cudnn_convolution_relu", fused),
        mock.patch.object(torch, "cudnn_convolution_add_relu", fused_add),
        intercept(on_launch),
    )
    with ExitStack() as stack:
        for each in as_on_cuda:
            stack.enter_context(each)
        stack.enter_context(_Launches(counts))
        yield counts


def launches(model: torch.nn.Module, x: Tensor, *, frozen: bool = True) -> Counter[str]:
    """The launches of one call without gradients; ``frozen``: what is folded is kept, as in a ``Runner``."""
    with torch.no_grad(), fastseg.frozen(model) if frozen else nullcontext():
        with count():
            model(x)
        with count() as counts:
            model(x)
    return +counts


def of_model(name: str, options: dict, side: int = 512, classes: int = 21) -> tuple[Counter[str], ...]:
    """Launches of one eval forward, eager's, ours, and ours in a Runner: bf16 (SegNet-Basic: fp32), channels_last, one
    image."""
    dtype = torch.float32 if name == "segnet_basic" else torch.bfloat16  # its LRN has no bf16 on a CPU
    model = create(name, classes, **options).eval().to(dtype, memory_format=torch.channels_last)
    x = torch.zeros(1, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    return launches(eager_form(model), x), launches(model, x, frozen=False), launches(model, x)


def markdown() -> str:
    head = "| model, 1x3x512x512 | eager | fastseg | in a Runner | of these fastseg's kernels |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for label, (name, options) in CREATED.items():
        eager, ours, kept = of_model(name, options)
        own = sum(n for kernel, n in kept.items() if kernel.endswith("_kernel"))
        lines.append(f"| {label} | {eager.total()} | {ours.total()} | {kept.total()} | {own} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
