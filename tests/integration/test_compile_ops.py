"""torch.compile of every public op, without graph breaks, of one size and of any, forward and backward.

Runs in two processes: with the interpreter graphs hold the registered ops, and these the kernels; without it they hold
the references, torch's own ops, which torch.compile's first half alone captures: `test_every_model.py` has the second.
"""

from collections import Counter

import pytest
import torch
from op_calls import LAYOUTS, ROWS, Draw, Drawn, Row
from torch import Tensor

import fastseg.ops
from fastseg.losses import CrossEntropy, Dice
from fastseg.ops import (
    aspp,
    atrous_conv2d,
    bilinear_kernel,
    compose_pointwise,
    paste_masks,
    resize_concat_conv2d,
    upsample_confusion,
    upsample_loss,
    upsample_nearest_conv2d,
    upsample_threshold,
    upsample_topk,
)
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.forms import Forms

pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")
CLASSES = {"BatchNormArgs", "PoolIndices"}
BACKEND = "aot_eager" if INTERPRETED else "eager"


def _aspp(d: Draw) -> Drawn:
    def run(x, one, three, project, pool):
        return aspp(x, [one, three], [1, 2], project_weight=project, pool_weight=pool)

    return run, [d.map(2, 4, 3, 4), d.weight(4, 4, 1, 1), d.weight(4, 4, 3, 3), d.weight(5, 12, 1, 1),
                 d.weight(4, 4, 1, 1)]  # fmt: skip


def _atrous_conv(d: Draw) -> Drawn:
    def run(x, weight, bias, residual):
        return atrous_conv2d(x, weight, bias, 2, act="relu", residual=residual)

    return run, [d.map(2, 3, 3, 2), d.weight(4, 3, 3, 3), d.vector(4), d.map(2, 4, 3, 2)]


def _resized(d: Draw) -> Drawn:
    def run(low, high, weight, bias):
        return resize_concat_conv2d([low, high], weight, bias, size=high.shape[2:], act="relu")

    return run, [d.map(2, 3, 2, 3), d.map(2, 2, 4, 5), d.weight(4, 5, 1, 1), d.vector(4)]


def _doubled(d: Draw) -> Drawn:
    def run(x, skip, weight, bias):
        return upsample_nearest_conv2d(x, skip, weight, bias, act="relu")

    return run, [d.map(2, 3, 2, 3), d.map(2, 2, 4, 6), d.weight(4, 5, 3, 3), d.vector(4)]


def _composed(d: Draw) -> Drawn:
    def run(x, outer, inner, bias):
        weight, bias = compose_pointwise(outer, inner, bias)
        return torch.nn.functional.conv2d(x, weight, bias)

    return run, [d.map(2, 3, 2, 3), d.weight(4, 5, 1, 1), d.weight(5, 3, 1, 1), d.vector(5)]


def _loss(d: Draw) -> Drawn:
    terms = [(1.0, CrossEntropy()), (0.5, Dice())]
    return lambda x, target: upsample_loss(x, target, terms), [d.map(1, 5, 2, 3), d.classes(5, 1, 4, 6)]


def _confusion(d: Draw) -> Drawn:
    return lambda x, target: upsample_confusion(x, target, 5), [d.map(1, 5, 2, 3), d.classes(5, 1, 4, 6)]


def _pasted(masks, boxes):
    return paste_masks(masks, 3 * boxes, (7, 9))


PUBLIC = {
    name: ROWS[name]
    for name in (
        "max_pool1d, max_unpool1d", "max_pool2d, training", "max_pool3d, max_unpool3d", "max_unpool2d, int64",
        "max_unpool2d, compact", "max_unpool_conv2d", "batch_norm_act, batch", "batch_norm_act, running",
        "batch_norm_act_max_pool2d, batch", "separable_conv2d", "separable_conv2d, batch", "upsample_bilinear",
        "bilinear_conv_transpose2d", "upsample_concat", "upsample_concat_conv2d", "upsample_sum", "upsample_argmax",
        "upsample_cross_entropy, mean", "upsample_confidence", "masks_to_classes", "masks_to_queries",
        "upsample_trilinear",
    )
} | {
    "aspp": Row("", _aspp),
    "atrous_conv2d": Row("", _atrous_conv),
    "resize_concat_conv2d": Row("", _resized),
    "upsample_nearest_conv2d": Row("", _doubled),
    "compose_pointwise": Row("", _composed),
    "upsample_loss": Row("", _loss),
    "upsample_confusion": Row("", _confusion, False),
    "paste_masks": Row("", lambda d: (_pasted, [d.map(1, 1, 3, 3), d.rows(1, 4)]), False),
    "upsample_topk": Row("", lambda d: (lambda x: upsample_topk(x, 2, 7), [d.map(1, 5, 2, 3)]), False),
    "upsample_threshold": Row("", lambda d: (lambda x: upsample_threshold(x, 7), [d.map(1, 1, 2, 3)]), False),
    "bilinear_kernel": Row("", lambda d: (lambda x: x * bilinear_kernel(3, 3, 4).sum(), [d.map(2, 3, 2, 2)]), False),
}  # fmt: skip


def modes(name: str, every: bool) -> list[bool]:
    """With gradients or without. Of torch's own ops one graph is enough, but of convolutions, which a CPU packs."""
    grad = PUBLIC[name].grad
    both = every or INTERPRETED or "conv" in name or name in ("aspp", "compose_pointwise")
    return [False, True] if grad and both else [grad]


def outcome(run, row: Row, layout: str, times: int, grad: bool) -> list[Tensor]:
    """Results, gradients, and what became of the arguments, running statistics among them."""
    torch.manual_seed(0)
    draw = Draw(LAYOUTS[layout], grad, times)
    _, tensors = row.draw(draw)
    with torch.set_grad_enabled(grad):
        y = run(*tensors)
        if grad:
            y.backward(draw.gradient(y))
    results = list(y) if isinstance(y, tuple) else [y]
    return [t.detach() for t in (*results, *(t.grad for t in tensors if t.grad is not None), *tensors)]


# A size of its own is the easier half: with --long.
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.long), True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PUBLIC)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that are equal here need not be elsewhere
def test_compiled(name, dynamic, pytestconfig):
    """Of any size: the second one runs what the first one compiled."""
    row = PUBLIC[name]
    layout = "slice of channels" if dynamic and "slice of channels" in row.layouts else row.layouts[0]
    for grad in modes(name, pytestconfig.getoption("--long")):
        run, _ = row.draw(Draw(LAYOUTS[layout]))
        compiled = torch.compile(run, fullgraph=True, backend=BACKEND, dynamic=dynamic)
        for times in (1, 2)[: 1 + dynamic]:
            with torch.compiler.set_stance("fail_on_recompile" if times == 2 else "default"):
                got = outcome(compiled, row, layout, times, grad)
            for g, w in zip(got, outcome(run, row, layout, times, grad), strict=True):
                torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
                assert g.stride() == w.stride()


def test_every_public_function_is_compiled():
    names = {name for key in PUBLIC for name in key.split(", ")}
    assert set(fastseg.ops.__all__) - CLASSES <= names


CALLS = {"aspp": {"conv2d_act": 2}}  # the pooled branch and the projection


@pytest.mark.skipif(not INTERPRETED, reason="kernels are interpreted")
@pytest.mark.parametrize("name", PUBLIC)
def test_an_eager_call_decides_once(name, monkeypatch):
    """Each list is asked once a call: the public function or the registered op asks, never both."""
    asked, choose, decide = [], Forms.choose, Forms.decide

    def counted_decide(forms, *args, **options):
        asked.append(forms.op)
        with monkeypatch.context() as once:
            once.setattr(Forms, "choose", choose)
            return decide(forms, *args, **options)

    def counted_choose(forms, request):
        asked.append(forms.op)
        return choose(forms, request)

    row = PUBLIC[name]
    for grad in [False, True] if row.grad else [False]:
        run, tensors = row.draw(Draw(LAYOUTS[row.layouts[0]], grad))
        with monkeypatch.context() as counted, torch.set_grad_enabled(grad):
            counted.setattr(Forms, "decide", counted_decide)
            counted.setattr(Forms, "choose", counted_choose)
            run(*tensors)
        assert {op: times for op, times in Counter(asked).items() if times > 1} == CALLS.get(name, {})
        asked.clear()
