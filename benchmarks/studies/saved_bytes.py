"""Print what SegNet's stages move and what they and whole nets keep for backward, exactly and without a GPU.

    python -m benchmarks.studies.saved_bytes

Nothing is computed: the ops run on fake tensors of the full size, and autograd's hooks see what each keeps. Traffic is
the floor of ``op_floors.pool_bytes``, which ``tests/ops/pooling/test_traffic.py`` counts launch by launch.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: fake CPU tensors then take the kernels' path

from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.bench_models import CREATED, label
from benchmarks.bench_pooling import EAGER_POOL, sizes
from benchmarks.roofline.op_floors import pool_bytes
from benchmarks.workloads import SEGNET_STAGES, ModelShape, PoolShape
from fastseg.measure.comparison import eager_form
from fastseg.models import create
from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d, max_pool2d

HEADER = ("stage", "pool eager -> ours, MB moved", "unpool eager -> ours", "pool eager -> ours, MB kept",
          "norm + ReLU + pool eager -> ours, MB kept")  # fmt: skip
MODEL_HEADER = ("net", "training step eager -> ours, GB kept", "without the loss")
# SegNet-Basic has no bf16 on a CPU, and FCN looks at its weights, of which fake tensors have none.
MODELS = tuple(ModelShape(model, N=16) for model in CREATED if model not in ("segnet_basic", "fcn8s"))


def kept(shape: PoolShape) -> tuple[int, int, int, int]:
    """Bytes kept for backward: pooling with indices, eager and ours; norm, ReLU and pooling, eager and ours."""
    with FakeTensorMode():
        x = torch.empty(shape.N, shape.C, shape.H, shape.W, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        vectors = [torch.nn.Parameter(torch.ones(shape.C)) for _ in range(2)]
        norm = BatchNormArgs(torch.zeros(shape.C), torch.ones(shape.C), *vectors, training=True)
        ours = {"kernel_size": 2, "ceil_mode": True, "return_indices": True, "index_format": "compact"}
        forms = (
            EAGER_POOL,
            partial(max_pool2d, **ours),
            lambda x: EAGER_POOL(F.relu(F.batch_norm(x, *norm))),
            partial(batch_norm_act_max_pool2d, norm=norm, **ours),
        )
        return tuple(harness.kept_bytes(partial(form, x)) for form in forms)


def rows() -> list[tuple[str, list[float], tuple[int, int, int, int]]]:
    """Of each stage its label, its traffic (eager and ours, pool and unpool, channels_last) and its kept bytes."""
    out = []
    for shape in SEGNET_STAGES:
        if shape.N == 1:
            continue
        moved = pool_bytes(*sizes(shape))
        traffic = [moved[name] for name in ("pool eager", "pool 2-bit", "unpool eager CL", "unpool ours")]
        out.append((f"{shape.name} {shape.N}x{shape.C}x{shape.H}x{shape.W}", traffic, kept(shape)))
    return out


def kept_by_model(shape: ModelShape) -> tuple[int, int, int, int]:
    """Bytes kept for backward under bf16 autocast: of the loss, eager and ours; of the logits, eager and ours."""
    name, options = CREATED[shape.model]
    model = create(name, shape.classes, **options)
    plain = eager_form(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(shape.N, 3, shape.H, shape.W, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        target = torch.empty(shape.N, shape.H, shape.W, dtype=torch.long)
        forms = (
            lambda: F.cross_entropy(plain(x), target),
            lambda: model.loss(x, target),
            lambda: plain(x),
            lambda: model(x),
        )
        return tuple(harness.kept_bytes(form) for form in forms)


def markdown() -> str:
    lines = [HEADER, ["---"] * len(HEADER)]
    for label_, traffic, bytes_ in rows():
        pairs = [*zip(traffic[::2], traffic[1::2], strict=True), *zip(bytes_[::2], bytes_[1::2], strict=True)]
        lines.append([label_, *(f"{a / 1e6:.1f} -> {b / 1e6:.1f}" for a, b in pairs)])
    lines += [(), MODEL_HEADER, ["---"] * len(MODEL_HEADER)]
    for shape in MODELS:
        kept_ = kept_by_model(shape)
        lines.append([label(shape), *(f"{a / 1e9:.2f} -> {b / 1e9:.2f}" for a, b in (kept_[:2], kept_[2:]))])
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


if __name__ == "__main__":
    print(markdown())
