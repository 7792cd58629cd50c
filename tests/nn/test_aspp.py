"""ASPP against its children one after another: every form, training, evaluation, gradients, statistics, fallbacks."""

import copy
from contextlib import nullcontext

import pytest
import torch
from nets import unsettle
from torch import Tensor, nn

import fastseg
from fastseg.nn import ASPP
from fastseg.ops.core.dispatch import INTERPRETED

FORMS = {
    "torchvision": {},
    "biased": {"bias": True},
    "separable, pool first": {"separable": True, "pool_first": True},
    "pool first": {"pool_first": True},
    "no pool": {"image_pool": False},
    "sum": {"fusion": "sum", "bias": True},
    "sum, no bias": {"fusion": "sum"},
}
RATES = (1, 2, 9)  # the last lies wholly outside the map, but for its middle


def build(form: str, **options) -> ASPP:
    return unsettle(ASPP(16, 16, RATES, **FORMS[form], **options))


def plain(module: ASPP, x: Tensor) -> Tensor:
    """In plain torch, from the definition."""
    if module.fusion == "sum":
        return module.project(sum(conv(x) for conv in module.convs))
    maps = []
    for branch in module.convs:
        if isinstance(branch, fastseg.nn.SeparableConv2d):
            u = branch.mid_norm(branch.depthwise(x)).relu()
            maps.append(branch.post_norm(branch.pointwise(u)).relu())
        else:
            maps.append(branch(x).expand(-1, -1, *x.shape[2:]))
    if module.pool_first:
        maps.insert(0, maps.pop())
    return module.project(torch.cat(maps, 1))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, 7, 6, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_its_children(form, training):
    module = build(form).train(training)
    twin, x = copy.deepcopy(module), image().requires_grad_()
    got, want = module(x), plain(twin, x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(want)
    ours = torch.autograd.grad(got, [x, *module.parameters()], upstream)
    theirs = torch.autograd.grad(want, [x, *twin.parameters()], upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    module.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(twin, x), rtol=1e-11, atol=1e-11)
    with torch.no_grad(), fastseg.reference():
        torch.testing.assert_close(module(x), plain(twin, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["torchvision", "biased", "separable, pool first", "no pool"])
@pytest.mark.parametrize("runner", ["kernel", "library"])
@pytest.mark.parametrize("training", [False, True] if INTERPRETED else [False])  # a CPU joins maps to train
def test_no_map_is_copied_beside_another(form, runner, training, monkeypatch):
    """Each sum is taken up by the next projection where the branches are not one op."""
    module = build(form, **({"separable": True} if form == "no pool" else {})).train(training)
    twin, x, joined, cat = copy.deepcopy(module), image().requires_grad_(training), [], torch.cat
    with torch.set_grad_enabled(training):
        want = plain(twin, x)
        monkeypatch.setattr(torch, "cat", lambda ts, *a: joined.extend(t for t in ts if t.dim() > 1) or cat(ts, *a))
        with fastseg.force("atrous_branches", "reference") if runner == "library" else nullcontext():
            got = module(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert not joined
    if training:
        upstream = torch.randn_like(want)
        ours = torch.autograd.grad(got, [x, *module.parameters()], upstream)
        theirs = torch.autograd.grad(want, [x, *twin.parameters()], upstream)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_names_and_parameters():
    """torchvision's names; the counts of architectures that the field uses."""
    dense = ASPP(2048, rates=(12, 24, 36), device="meta")
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    parts = lambda conv, n: [f"{conv}.weight", *(f"{n}.{part}" for part in norm)]
    assert list(dense.state_dict()) == [
        *(key for i in range(4) for key in parts(f"convs.{i}.0", f"convs.{i}.1")),
        *parts("convs.4.1", "convs.4.2"), *parts("project.0", "project.1"),
    ]  # fmt: skip
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(dense) == 15_535_104
    assert count(ASPP(320, bias=True, device="meta")) == 2_707_968
    assert count(ASPP(2048, separable=True, device="meta")) == 3_019_776
    assert count(ASPP(2048, 21, (6, 12, 18, 24), fusion="sum", bias=True, device="meta")) == 1_548_372


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fusion": "max"}, r"ASPP: fusion is 'max'; use \"concat\" or \"sum\""),
        ({"rates": ()}, r"ASPP: rates are \(\); give one or more"),
        ({"rates": (6, 0)}, r"rates are \(6, 0\)"),
        ({"fusion": "sum", "separable": True}, "separable goes with"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ASPP(8, 8, **options)


def hook(module: nn.Module) -> list:
    seen = []
    module.register_forward_hook(lambda *args: seen.append(args[2].shape))
    return seen


@pytest.mark.parametrize("path", ["convs.1", "convs.1.0", "convs.2.1", "convs.4.1", "project.0"])
def test_children_with_hooks_are_called(path):
    module = build("torchvision").eval()
    x = image()
    with torch.no_grad():
        want = module(x)
        seen = hook(module.get_submodule(path))
        torch.testing.assert_close(module(x), want, rtol=1e-11, atol=1e-11)
    assert len(seen) == 1


def test_norms_that_differ_run_one_by_one():
    module = build("torchvision").train()
    module.convs[2][1].momentum = 0.3
    module.convs[1][1].eval()
    twin, x = copy.deepcopy(module), image()
    torch.testing.assert_close(module(x), plain(twin, x), rtol=1e-11, atol=1e-11)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_keeps_x_once(device):
    """For all branches together; and of the branches' maps the convolutions' results alone."""
    module, x = build("torchvision").train().to(device), image().to(device).requires_grad_()
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t
    ):
        module(x)
    maps = [t for t in kept.values() if t.dim() == 4 and t.shape[2:] == x.shape[2:]]
    assert sum(t.untyped_storage().nbytes() == x.untyped_storage().nbytes() for t in maps) <= 2  # x, the projection's
    assert sum(t.shape[1] for t in maps) == 16 + 4 * 16 + 16


def test_statistics_follow_the_data():
    """Every branch has statistics of its own, and eval uses them."""
    module = build("biased").train()
    before = [norm.running_mean.clone() for norm in (module.convs[0][1], module.convs[3][1])]
    module(image())
    after = [norm.running_mean for norm in (module.convs[0][1], module.convs[3][1])]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [int(norm.num_batches_tracked) for norm in (module.convs[0][1], module.convs[4][2])] == [1, 1]
