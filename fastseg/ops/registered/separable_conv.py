"""The registered ops behind ``separable_conv2d``, each with its implementations, and their autograd Function.

``separable_conv2d`` returns y alone. ``separable_conv2d_train`` also returns what the backward and the running
statistics need. ``separable_conv2d_bwd`` returns every gradient but that of the residual, which is dy itself.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import HAS_TRITON, autocasts
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict
from fastseg.ops.core.layout import channels_last, like, memory_format_of, new_map
from fastseg.ops.core.norm import ACTIVATION_GRADS, ACTIVATIONS, PlainNorm, activate, plain_norm_bwd, stats_dtype_of
from fastseg.ops.core.register import qualified, register
from fastseg.ops.core.torch_private import is_bare
from fastseg.ops.cpu.packed import conv2d

if HAS_TRITON:
    from fastseg.kernels.common.norm_args import Norm
    from fastseg.kernels.runtime.ceilings import Chip, chip_of
    from fastseg.kernels.runtime.conv_sizes import Geometry
    from fastseg.kernels.separable_conv.cost import plan
    from fastseg.kernels.separable_conv.fwd import Acts, Weights, tap_weights
    from fastseg.kernels.separable_conv.launch import Needs, separable_conv_bwd, separable_conv_fwd, with_stats

TENSORS = 14  # tensor fields of Call; the rest are numbers and names


class Call(NamedTuple):
    """The arguments of the registered ops, in the order of their schemas."""

    x: Tensor
    dw: Tensor
    pw: Tensor
    dw_bias: Tensor | None
    pw_bias: Tensor | None
    mid_mean: Tensor | None  # running statistics; None if the batch statistics are used
    mid_var: Tensor | None
    mid_weight: Tensor | None
    mid_bias: Tensor | None
    post_mean: Tensor | None
    post_var: Tensor | None
    post_weight: Tensor | None
    post_bias: Tensor | None
    residual: Tensor | None
    stride: int
    padding: int
    dilation: int
    pre_act: str
    mid_act: str
    post_act: str
    mid: str  # "none", "running" or "batch"
    mid_eps: float
    post: str
    post_eps: float
    out_act: str = "none"  # after the residual; there is no post_act then. Only in the op without gradients
    form: str = ""  # of ``LAUNCH_FORMS``, where the caller has asked; "" asks here

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        N, _, H, W = self.x.shape
        space = 2 * self.padding - self.dilation * (self.dw.shape[-1] - 1) - 1
        return N, self.pw.shape[0], (H + space) // self.stride + 1, (W + space) // self.stride + 1

    @property
    def keeps_z(self) -> bool:
        """True if a backward reads the pointwise convolution's output."""
        return self.post != "none" or self.post_act != "none"


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", str: "str", float: "float"}
_DEFAULTS = {name: f'="{value}"' for name, value in Call._field_defaults.items()}
_SCHEMA = ", ".join(f"{_TYPES[kind]} {name}{_DEFAULTS.get(name, '')}" for name, kind in Call.__annotations__.items())


# --- with kernels


class Request(NamedTuple):
    """What decides between the forms."""

    no_kernel: str  # why no kernel can run on such tensors, or what follows the call; or ""
    g: "Geometry | None"  # None in a graph, whose sizes are unknown, and where ``no_kernel`` decides
    dtype: torch.dtype
    mid_batch_stats: bool
    chip: "Chip | None"
    folds: bool = False  # no gradient is recorded, in fp32 or fp64: torch's ops may take folded norms


def request_of(
    x: Tensor, sizes: tuple[int, ...], K: int, options: tuple[int, int, int], batch: bool, folds: bool = False
) -> Request:
    """Of a call that kernels can run: ``sizes`` are (N, C, H, W, COUT, OH, OW)."""
    return Request("", Geometry(*sizes, K, *options), x.dtype, batch, chip_of(x.device), folds)


def _request(a: Call) -> Request:
    sizes = (*a.x.shape, *a.out_shape[1:])
    return request_of(a.x, sizes, a.dw.shape[-1], (a.stride, a.padding, a.dilation), a.mid == "batch")


def _refuses(r: Request) -> str:
    if r.no_kernel or r.g is None:
        return r.no_kernel
    return f"kernel size {r.g.K} > 7" if r.g.K > 7 else r.g.unsupported()


class KernelForm(Form):
    """Our kernels: "fused" keeps the depthwise map on the chip, "split" stores it once."""

    def __init__(self, name: str):
        self.name = name

    def refuses(self, r: Request) -> str:
        return _refuses(r)

    def cost(self, r: Request) -> Verdict | None:
        if r.g is None:
            return None
        fused = plan(r.g, r.dtype, mid_batch_stats=r.mid_batch_stats, chip=r.chip)
        return fused if self.name == "fused" else fused.reversed()

    def launch(self, a: Call, g: "Geometry", train: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        residual = None if a.residual is None else channels_last(a.residual)
        out = separable_conv_fwd(*_kernel_args(a, g), residual, fused=self.name == "fused", save_z=train and a.keeps_z)
        return like(a.x, out.y), *out[1:]


def _kernel_args(a: Call, g: "Geometry") -> tuple:
    """Convert the schema's arguments to the launchers': settled layouts, grouped norms and sizes."""
    dense = []
    for t in a[2:13]:
        dense.append(None if t is None else t.contiguous())
    pw, dw_bias, pw_bias, *stats = dense
    mid = None if a.mid == "none" else Norm(*stats[:4], a.mid_eps, a.mid == "batch")
    post = None if a.post == "none" else Norm(*stats[4:], a.post_eps, a.post == "batch")
    weights = Weights(tap_weights(a.dw, g), pw, dw_bias, pw_bias)
    return channels_last(a.x), weights, g, Acts(a.pre_act, a.mid_act, a.post_act, a.out_act), mid, post


class LaunchForm(KernelForm):
    """What the registered ops launch."""

    run = KernelForm.launch


def _launch(a: Call, train: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    request = _request(a)
    if a.form:
        return LAUNCH_FORMS.named(a.form).run(a, request.g, train)
    return LAUNCH_FORMS(request, a, request.g, train)


def _launch_eval(*args) -> Tensor:
    return _launch(Call(*args), False)[0]


def run_eval(form: KernelForm, g: "Geometry", *args) -> Tensor:
    """The registered op without gradients; where nothing stands before it, the form that was chosen for the call."""
    bare = not torch.compiler.is_dynamo_compiling() and is_bare(args)
    return form.launch(Call(*args), g, False)[0] if bare else eval_op(*args)


def _launch_train(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Call(*args)
    y, z, mid_stats, post_stats = _launch(a, True)
    stats = stats_dtype_of(a.x)
    empty = lambda t, dtype: a.x.new_empty(0, dtype=dtype) if t is None else t
    return y, empty(z, a.x.dtype), empty(mid_stats, stats), empty(post_stats, stats)


def _launch_bwd(dy: Tensor, z: Tensor, mid_stats: Tensor, post_stats: Tensor, needs: list[bool], *args):
    request = _request(Call(*args))
    return BACKWARD_FORMS(request, request.g, dy, z, mid_stats, post_stats, needs, *args)


class BackwardForm(Form):
    """Our kernels for every gradient."""

    name = "kernel"

    def refuses(self, r: Request) -> str:
        return _refuses(r)

    def run(self, g: "Geometry", dy: Tensor, z: Tensor, mid_stats: Tensor, post_stats: Tensor, needs, *args):
        a = Call(*args)
        x, weights, g, acts, mid, post = _kernel_args(a, g)
        mid, post = with_stats(mid, mid_stats), with_stats(post, post_stats)
        wanted = Needs(*needs)
        z = z if a.keeps_z else None
        grads = separable_conv_bwd(channels_last(dy), x, z, weights, g, acts, mid, post, wanted)
        dx = None if grads.x is None else like(a.x, grads.x)
        flat = (dx, *grads[1:5], *_norm_grads(grads.mid), *_norm_grads(grads.post))
        owners = _owners(a)
        return tuple(
            x.new_empty(0) if grad is None else grad.to(owner.dtype) for grad, owner in zip(flat, owners, strict=True)
        )


def _norm_grads(sums: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Turn (2, C) sums of g and g uhat into gradients of weight and bias, as separate tensors."""
    return (None, None) if sums is None else (sums[1].clone(), sums[0].clone())


def per_output(needs: list[bool]) -> tuple[bool, ...]:
    """Expand ``needs`` (x, dw, pw, dw_bias, pw_bias, mid, post) to one flag per output; a norm has two outputs."""
    *five, mid, post = needs
    return (*five, mid, mid, post, post)


def _owners(a: Call) -> tuple[Tensor, ...]:
    """The tensors whose gradients the backward op returns, in order; x stands for an absent tensor."""
    tensors = (a.x, a.dw, a.pw, a.dw_bias, a.pw_bias, a.mid_weight, a.mid_bias, a.post_weight, a.post_bias)
    return tuple(a.x if t is None else t for t in tensors)


# --- in plain PyTorch


def compose(
    x, dw, pw, dw_bias, pw_bias, residual, stride, padding, dilation, pre_act, mid_act, post_act, mid_norm, post_norm,
    *, inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op written out, with the norms as functions. -> y, z; ``inplace``, z may have become y."""
    autocast = autocasts(x)  # then torch casts the weights, and keeps the casts
    cast = lambda t: t if t is None or autocast else t.to(x.dtype)
    v = ACTIVATIONS[pre_act](x)
    u = conv2d(v, cast(dw), cast(dw_bias), (stride,) * 2, (padding,) * 2, (dilation,) * 2, dw.shape[0])
    z = conv2d(activate(mid_norm(u), mid_act, inplace=inplace), cast(pw), cast(pw_bias))
    y = activate(post_norm(z), post_act, inplace=inplace)
    return y if residual is None else y + residual, z


def _plain_norms(a: Call) -> tuple[PlainNorm, PlainNorm]:
    return PlainNorm(a.mid, *a[5:9], a.mid_eps, a.x), PlainNorm(a.post, *a[9:13], a.post_eps, a.x)


def _plain_eval(*args) -> Tensor:
    return _plain_train(*args)[0]


def _plain_train(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Call(*args)
    mid, post = _plain_norms(a)
    y, z = compose(*a[:5], *a[13:20], mid, post)
    y = ACTIVATIONS[a.out_act](y)
    z = channels_last(z) if a.keeps_z else z.new_empty(0)
    return like(a.x, y.to(a.x.dtype)), z, mid.stats, post.stats


def _plain_bwd(dy: Tensor, z: Tensor, mid_stats: Tensor, post_stats: Tensor, needs: list[bool], *args):
    a = Call(*args)
    wide = stats_dtype_of(a.x)
    conv = torch.ops.aten.convolution_backward
    cast = lambda t: t.to(wide)
    v = ACTIVATIONS[a.pre_act](cast(a.x))
    bias = None if a.dw_bias is None else cast(a.dw_bias)
    geometry = ([a.stride] * 2, [a.padding] * 2, [a.dilation] * 2, False, [0, 0], a.dw.shape[0])
    u = F.conv2d(v, cast(a.dw), bias, *geometry[:3], groups=geometry[5])
    mid, post = _plain_norms(a)
    for norm, stats in ((mid, mid_stats), (post, post_stats)):
        if norm.kind == "batch":
            norm.kind, norm.mean, norm.var = "running", stats[0], stats[1]
    activated = ACTIVATIONS[a.mid_act](mid(u))
    dz, dpost_weight, dpost_bias = plain_norm_bwd(cast(dy), cast(z), post, a.post == "batch", a.post_act)
    ones, zeros = [1, 1], [0, 0]
    da, dpw, dpw_bias = conv(dz, activated, cast(a.pw), [a.pw.shape[0]], ones, zeros, ones, False, zeros, 1, [True] * 3)
    du, dmid_weight, dmid_bias = plain_norm_bwd(da, u, mid, a.mid == "batch", a.mid_act)
    dv, ddw, ddw_bias = conv(du, v, cast(a.dw), [a.dw.shape[0]], *geometry, [True] * 3)
    if a.mid == "batch":  # the norm subtracts a constant again: the gradient is exactly 0, as in the kernels
        ddw_bias = torch.zeros_like(ddw_bias)
    if a.post == "batch":
        dpw_bias = torch.zeros_like(dpw_bias)
    dx = like(a.x, ACTIVATION_GRADS[a.pre_act](dv, cast(a.x)))
    grads = (dx, ddw, dpw, ddw_bias, dpw_bias, dmid_weight, dmid_bias, dpost_weight, dpost_bias)
    return tuple(
        grad.to(owner.dtype, memory_format=memory_format_of(owner)) if want else a.x.new_empty(0)
        for grad, want, owner in zip(grads, per_output(needs), _owners(a), strict=True)
    )


LAUNCH_FORMS = Forms(
    "separable_conv2d", [LaunchForm("fused"), LaunchForm("split"), Reference(lambda a, g, train: _plain_train(*a))],
    backward=True,
)  # fmt: skip
BACKWARD_FORMS = Forms(
    "separable_conv2d", [BackwardForm(), Reference(lambda g, *args: _plain_bwd(*args))], backward=True
)


# --- shapes, registration, autograd


def _fake_eval(*args) -> Tensor:
    a = Call(*args)
    return new_map(a.x, a.out_shape)


def _fake_train(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = Call(*args)
    N, COUT, OH, OW = a.out_shape
    z = a.x.new_empty(N, OH, OW, COUT).permute(0, 3, 1, 2) if a.keeps_z else a.x.new_empty(0)
    dtype = stats_dtype_of(a.x)
    stats = lambda kind, channels: a.x.new_empty((3, channels) if kind == "batch" else 0, dtype=dtype)
    return new_map(a.x, a.out_shape), z, stats(a.mid, a.x.shape[1]), stats(a.post, COUT)


def _fake_bwd(dy: Tensor, z: Tensor, mid_stats: Tensor, post_stats: Tensor, needs: list[bool], *args):
    a = Call(*args)
    grads = []
    for want, owner in zip(per_output(needs), _owners(a), strict=True):
        if not want:
            grads.append(a.x.new_empty(0))
        elif owner is a.x:
            grads.append(new_map(a.x, a.x.shape))
        else:
            grads.append(owner.new_empty(owner.shape))
    return tuple(grads)


eval_op = register(f"separable_conv2d({_SCHEMA}) -> Tensor", _launch_eval, _plain_eval, _fake_eval)
train_op = register(
    f"separable_conv2d_train({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)", _launch_train, _plain_train, _fake_train
)
bwd_op = register(
    "separable_conv2d_bwd(Tensor dy, Tensor z, Tensor mid_stats, Tensor post_stats, bool[] needs, "
    f"{_SCHEMA}) -> ({', '.join(['Tensor'] * 9)})",
    _launch_bwd,
    _plain_bwd,
    _fake_bwd,
)


class SeparableConv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        y, z, mid_stats, post_stats = train_op(*args)
        SeparableConv2dFunction.save(ctx, args, (y, z, mid_stats, post_stats))
        ctx.mark_non_differentiable(mid_stats, post_stats)
        return y, mid_stats, post_stats

    @staticmethod
    def save(ctx, inputs, output) -> None:
        *read, _ = inputs[:TENSORS]  # no gradient reads the residual, the last argument
        ctx.save_for_backward(*output[1:], *read, None)
        ctx.options = inputs[TENSORS:]

    @staticmethod
    def gradients(ctx, saved, dy, *_):
        z, mid_stats, post_stats, *tensors = saved
        a = Call(*tensors, *ctx.options)
        need = Call(*ctx.needs_input_grad)
        needs = [need.x, need.dw, need.pw, need.dw_bias, need.pw_bias,
                 bool(need.mid_weight or need.mid_bias), bool(need.post_weight or need.post_bias)]  # fmt: skip
        grads = bwd_op(dy, z, mid_stats, post_stats, needs, *a)
        grads = [grad if want else None for grad, want in zip(grads, per_output(needs), strict=True)]
        dx, ddw, dpw, ddw_bias, dpw_bias, dmid_weight, dmid_bias, dpost_weight, dpost_bias = grads
        residual = dy if need.residual else None
        running = (None, None)
        tensor_grads = (dx, ddw, dpw, ddw_bias, dpw_bias, *running, dmid_weight, dmid_bias, *running, dpost_weight,
                        dpost_bias, residual)  # fmt: skip
        return *tensor_grads, *(None for _ in ctx.options)

    @staticmethod
    def again(ctx, saved, dy, *_):
        _, _, _, *tensors = saved

        def forward(*tensors):
            a = Call(*tensors, *ctx.options)
            return compose(*a[:5], *a[13:20], *_plain_norms(a))[0].to(a.x.dtype)

        need = ctx.needs_input_grad
        grads = derived(forward, tensors, (*need[: TENSORS - 1], False), dy)
        return *grads[:-1], dy if need[TENSORS - 1] else None, *(None for _ in ctx.options)

    backward = staticmethod(differentiable(gradients, again))


torch.library.register_autograd(
    qualified("separable_conv2d_train"),
    lambda ctx, dy, *_: SeparableConv2dFunction.backward(ctx, dy),
    setup_context=SeparableConv2dFunction.save,
)
