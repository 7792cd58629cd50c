"""3x3 convolution of a map that is doubled by nearest neighbours: a transposed convolution of the small map.

Each output pixel reads a 3x3 window of the doubled map, that is 2x2 pixels of the small one, several times over. The
filters of equal pixels are summed once. Along one axis, with filter (a, b, c) and outputs 2i and 2i + 1,

    y[2i] = a x[i - 1] + (b + c) x[i],    y[2i + 1] = (a + b) x[i] + c x[i + 1]

which is a transposed convolution with kernel (c, b + c, a + b, a), stride 2 and padding 1: 4 products in place of 9, no
doubled map, and zero padding stays exact.
"""

import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype, followed
from fastseg.ops.core.explain import in_reference
from fastseg.ops.core.forms import Form, Forms, Torchs, Verdict
from fastseg.ops.core.kept import keeper, made_once
from fastseg.ops.core.norm import ACTIVATIONS, Activation, activate
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import same_number
from fastseg.ops.cpu.packed import conv2d, conv_transpose2d

if HAS_TRITON:
    from fastseg.kernels.runtime.ceilings import Chip, chip_of

NAME = "upsample_nearest_conv2d"
Name = Literal["transposed", "phases", "upsampled"]


@overridable
def upsample_nearest_conv2d(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    act: Activation | None = None,
    up_first: bool = True,
    form: Name | None = None,
) -> Tensor:
    """``act(conv2d(cat([interpolate(x, size), skip], 1), weight, bias, padding=1))``, nearest neighbours.

    Where ``size`` is twice that of ``x``, the filters of ``x`` are summed over equal pixels: 2.25 times fewer products,
    and the doubled map is not made. The sum of the filters is computed in fp32 or wider, at each call, and is
    differentiable; results differ from the plain form by rounding. Other sizes are interpolated first.

    Args:
        x: (N, C, h, w).
        skip: (N, CS, H, W), or None.
        weight: (COUT, C + CS, 3, 3).
        bias: (COUT,).
        size: (H, W) in pixels; None means the size of ``skip``, or twice that of ``x`` without one.
        act: None, "relu", "relu6" or "leaky_relu".
        up_first: False for ``cat([skip, interpolate(x, size)], 1)``.
        form: "transposed", one transposed convolution; "phases", a 2x2 convolution for each parity of row and column;
            "upsampled", the interpolation first. None chooses (``fastseg.explain()`` shows it).

    Returns:
        (N, COUT, H, W), in autocast's dtype under autocast.

    Raises:
        ValueError: a map is not 4-D or has no pixel, sizes, batches, weight or bias do not fit, the activation or the
            form is unknown, or a form is asked for at sizes that do not double.
        TypeError: a map is not floating point.

    Reference: the U-Net decoder with nearest-neighbour upsampling; Odena et al., doi:10.23915/distill.00003.
    """
    given = skip is not None or size is not None
    size = _size(x, skip, size)
    _check(x, skip, weight, bias, size, act, form)
    # A form that is asked for needs sizes that double: a trace looks at those of its example.
    same = operator.eq if form in ("transposed", "phases") and isinstance(size[0], Tensor) else same_number
    doubles = not given or all(same(n, 2 * m) for n, m in zip(size, x.shape[2:], strict=True))
    why = "" if doubles else f"{tuple(x.shape[2:])} to {tuple(size)} is no doubling"
    if why and form in ("transposed", "phases") and not in_reference():
        raise ValueError(f"{NAME}: form is {form!r}, but {why}; use form=None")
    dtype = autocast_dtype(x) if skip is None else torch.promote_types(autocast_dtype(x), autocast_dtype(skip))
    chosen = FORMS.decide(_request(x, weight, why, form), x)
    y: Tensor = chosen.run(x, skip, weight, bias, size, act, up_first, dtype)
    return y


def upsample_nearest_conv2d_ref(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    act: Activation | None = None,
    up_first: bool = True,
) -> Tensor:
    """``upsample_nearest_conv2d`` in plain PyTorch."""
    y = F.interpolate(x, _size(x, skip, size), mode="nearest")
    y = y if skip is None else torch.cat([y, skip] if up_first else [skip, y], 1)
    return ACTIVATIONS[act or "none"](F.conv2d(y, weight, bias, padding=1))


# Elements that summing the filters reads and writes, for each pair of channels.
BUILD = 60
# Pixels from which one CPU thread gains. In processor time, plain over transposed: 0.39 at 8^2 (320 + 96 -> 256
# channels), 0.92 at 16^2, 1.35 at 32^2, 1.65 at 64^2, 1.84 at 128^2; with filters kept 0.55, 1.07, 1.43, 1.71, 1.95.
LEAST_CPU, LEAST_CPU_KEPT = 400, 200


class Request(NamedTuple):
    """What decides between the forms."""

    why: str  # why the filters cannot be summed, or ""
    asked: str | None  # the form that the caller asked for
    pixels: int = 0  # of x, in all images; 0 in a graph, a trace or a transform: the filters are then summed
    kept: bool = False  # sums of a frozen weight are made once
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of x
    bytes: int = 4  # of an element of the weight
    chip: "Chip | None" = None


def _request(x: Tensor, weight: Tensor, why: str = "", asked: str | None = None) -> Request:
    if why or asked or followed(x, weight):
        return Request(why, asked)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    chip = chip_of(x.device) if x.is_cuda and HAS_TRITON else None
    kept = keeper((weight,)) is not None
    return Request("", None, pixels, kept, x.device.type, x.dtype, weight.element_size(), chip)


def sums_pay(x: Tensor, weight: Tensor) -> bool:
    """True if the filters are summed where sizes double, at the sizes of ``x``."""
    cost = TRANSPOSED.cost(_request(x, weight))
    return cost is None or cost.pays


class SummedForm(Form):
    """A convolution of the small map with summed filters: transposed, or one for each parity of row and column."""

    path = "torch"

    def __init__(self, name: str, filters: Callable[[Tensor], Tensor], convolve: Callable[..., Tensor]):
        self.name, self.filters, self.convolve = name, filters, convolve

    def refuses(self, r: Request) -> str:
        return r.why or ("" if r.asked in (None, self.name) else f"asked for {r.asked!r}")

    def cost(self, r: Request) -> Verdict | None:
        """The faster form where sizes double. Both have the same products.

        The four phases are written by one convolution, read, and written again in order: three passes over the result
        where the transposed convolution makes one. That decides until a GPU has shown that its library needs more than
        that for a transposed convolution.

        Of a few pixels the sum of the filters, made at each call, costs more than it saves. A graph's compiler makes it
        in one pass, and inside ``fastseg.frozen`` it is made once.
        """
        if r.asked:
            return None
        if self.name != "transposed":
            return Verdict(False, None, "three passes over the result; the transposed convolution makes one")
        if r.pixels == 0 or (r.chip is None and r.device != "cpu"):
            pays = True
        elif r.chip is not None:
            pays = r.kept or BUILD * r.bytes / r.chip.bandwidth < 2 * 20 * r.pixels / r.chip.dot(r.dtype)
        else:
            pays = r.pixels >= (LEAST_CPU_KEPT if r.kept else LEAST_CPU)
        return Verdict(pays, None, "transposed" if pays else "few pixels: summing the filters costs more than it saves")

    def run(
        self, x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, size: tuple[int, int],
        act: Activation | None, up_first: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        up, rest = _parts(weight, x.shape[1], up_first)
        key = (NAME, self.name, x.shape[1], up_first, dtype)
        filters = made_once((weight,), key, lambda: self.filters(up).to(dtype))
        bias = None if bias is None else bias.to(dtype)
        y = self.convolve(x.to(dtype), filters, None if skip is not None else bias)
        if skip is None:
            return activate(y, act, inplace=True)
        return conv2d_act(skip.to(dtype), rest.to(dtype), bias, act, (1, 1), (1, 1), (1, 1), 1, residual=y)


# --- the two forms


def _paired(w: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c = w.unbind(axis)
    return a, b + c, a + b, c


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def transposed_filters(weight: Tensor) -> Tensor:
    """(COUT, C, 3, 3) -> (C, COUT, 4, 4), the filters of the transposed convolution; in fp32 or wider."""
    w = _wide(weight)
    for axis in (2, 3):
        a, bc, ab, c = _paired(w, axis)
        w = torch.stack((c, bc, ab, a), axis)
    return w.transpose(0, 1).contiguous()


def phase_filters(weight: Tensor) -> Tensor:
    """(COUT, C, 3, 3) -> (4 COUT, C, 2, 2): for even and odd rows, and in each for even and odd columns."""
    w = _wide(weight)
    out = []
    a, bc, ab, c = _paired(w, 2)
    for rows in (torch.stack((a, bc), 2), torch.stack((ab, c), 2)):
        a, bc, ab, c = _paired(rows, 3)
        out += [torch.stack((a, bc), 3), torch.stack((ab, c), 3)]
    return torch.cat(out)


def _transposed(x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    return conv_transpose2d(x, filters, bias, (2, 2), (1, 1))


def _phases(x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    h, w = x.shape[2:]
    y = conv2d(x, filters, None, padding=(1, 1)).unflatten(1, (2, 2, -1))  # pixel p reads x[p - 1] and x[p]
    rows = [torch.stack([y[:, a, b, :, a : a + h, b : b + w] for b in (0, 1)], -1) for a in (0, 1)]
    y = torch.stack(rows, 3).flatten(4).flatten(2, 3)
    return y if bias is None else y + bias[:, None, None]


def _upsampled(x, skip, weight, bias, size, act, up_first: bool, dtype: torch.dtype) -> Tensor:
    y = F.interpolate(x, size, mode="nearest")
    y = y if skip is None else torch.cat([y, skip] if up_first else [skip, y], 1)
    bias = None if bias is None else bias.to(dtype)
    return activate(conv2d(y.to(dtype), weight.to(dtype), bias, padding=(1, 1)), act, inplace=True)


TRANSPOSED = SummedForm("transposed", transposed_filters, _transposed)
FORMS = Forms(NAME, [
    TRANSPOSED, SummedForm("phases", phase_filters, _phases), Torchs(_upsampled, "upsampled"),
])  # fmt: skip


def _parts(weight: Tensor, channels: int, up_first: bool) -> tuple[Tensor, Tensor]:
    """The filters of the upsampled channels, and those of the others."""
    rest = weight.shape[1] - channels
    cut = channels if up_first else rest
    halves = weight[:, :cut], weight[:, cut:]
    if keeper((weight,)) is not None:  # in memory of their own they can be packed
        first, last = halves
        halves = made_once((weight,), (NAME, cut), lambda: (first.clone(), last.clone()))
    return halves if up_first else halves[::-1]


def _size(x: Tensor, skip: Tensor | None, size) -> tuple[int, int]:
    if size is not None:
        return tuple(size)
    return tuple(skip.shape[2:]) if skip is not None else (2 * x.shape[2], 2 * x.shape[3])


def _check(x, skip, weight, bias, size, act, form) -> None:
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{NAME}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    names = [form.name for form in FORMS.forms]
    if form is not None and form not in names:
        raise ValueError(f"{NAME}: form is {form!r}; use None, {', '.join(map(repr, names))}")
    for label, t in (("x", x), ("skip", skip)):
        if t is None:
            continue
        if t.dim() != 4 or 0 in t.shape[1:]:
            raise ValueError(f"{NAME}: {label} is {tuple(t.shape)}; it must be (N, C, H, W), none of C, H, W being 0")
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {label} is {t.dtype}; it must be a floating-point tensor")
    if len(size) != 2:
        raise ValueError(f"{NAME}: size is {size}; give (height, width)")
    if skip is not None and (skip.shape[0] != x.shape[0] or tuple(skip.shape[2:]) != tuple(size)):
        raise ValueError(
            f"{NAME}: skip is {tuple(skip.shape)}; it must have the batch of x, {x.shape[0]}, and the size "
            f"{tuple(size)}"
        )
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 3, 3):
        raise ValueError(f"{NAME}: weight is {tuple(weight.shape)}; it must be (COUT, {channels}, 3, 3)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: bias is {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
