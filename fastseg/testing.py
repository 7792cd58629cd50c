"""Compare an op with its reference; buffers that show what a kernel leaves unwritten or writes out of bounds.

Shared by tests, benchmarks and users; needs torch only.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils.deterministic
from torch import Tensor

GUARD = 256  # elements either side of a buffer: several rows of a block, and a multiple of every alignment


class Tolerance(NamedTuple):
    """``|got - want| <= atol_scale * max|want| + rtol * |want|``."""

    rtol: float
    atol_scale: float


# Against a reference in fp64. The half types are stored rounded once: one unit in the last place, which also covers the
# interpreter's truncating bf16 store, and half of one at the largest value for an intermediate stored in that type.
TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol_scale=1e-12),
    torch.float32: Tolerance(rtol=1e-6, atol_scale=2e-6),
    torch.float16: Tolerance(rtol=2**-10, atol_scale=2**-11),
    torch.bfloat16: Tolerance(rtol=2**-7, atol_scale=2**-8),
}

_STATISTICS = ("running_mean", "running_var")  # buffers that training batch norm updates in place


def check_op(
    op: Callable[..., Any],
    ref: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    grad: bool = True,
    tolerance: Tolerance | None = None,
    terms: int = 1,
    out_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    **kwargs: Any,
) -> None:
    """Compare ``op(*inputs, **kwargs)`` with ``ref`` on fp64 copies of the same arguments on the CPU.

    Compared are every output (value, dtype, memory format) and, under a random upstream gradient, the gradient of every
    tensor that requires one; no argument may change. Tensors inside tuples, lists and dicts count as arguments. In a
    group of arguments with ``training=True``, ``running_mean`` and ``running_var`` are updated in place: they are
    compared with the reference's updated ones.

    Args:
        op: the function under test.
        ref: the same function in plain PyTorch.
        inputs: positional arguments of both.
        grad: compare gradients; False runs both without autograd.
        tolerance: in place of the entry of ``TOLERANCES`` for the coarsest dtype among arguments and outputs.
        terms: length of the longest sum behind one element; an fp32 sum of K terms is allowed sqrt(K) roundings more.
        out_dtype: dtype of the floating-point outputs, one or one each; None: that of the first such argument.
        kwargs: keyword arguments of both.

    Raises:
        AssertionError: they differ; says which tensor, its worst element, both values and the error allowed.
    """
    arguments = {**{f"inputs[{i}]": value for i, value in enumerate(inputs)}, **kwargs}
    leaves = dict(_leaves(arguments))
    updated = _updated(arguments)
    before = {name: _bits(t).clone() for name, t in leaves.items()}
    copies: dict[int, Tensor] = {}
    ref_inputs, ref_kwargs = _copy(list(inputs), copies), _copy(kwargs, copies)

    with torch.set_grad_enabled(grad):
        got = _outputs(op(*inputs, **kwargs))
        with torch.autocast("cpu", enabled=False):
            want = _outputs(ref(*ref_inputs, **ref_kwargs))

    def check_unchanged(when: str) -> None:
        for name, t in leaves.items():
            if name not in updated and not torch.equal(_bits(t), before[name]):
                raise AssertionError(f"{name} was changed by the {when}; an op leaves its arguments as they were")

    check_unchanged("forward")
    floats = [t.dtype for t in leaves.values() if t.is_floating_point()]
    _check_form(got, want, list(leaves.values()), out_dtype or (floats[0] if floats else torch.float32))
    if tolerance is None:
        coarsest = max((*floats, *(t.dtype for t in got.values() if t.is_floating_point())), key=_eps, default=None)
        tolerance = TOLERANCES[coarsest] if coarsest is not None else None
    judge = functools.partial(compare, tolerance=tolerance, terms=terms)

    for name in got:
        judge(got[name], want[name], name=name)
    for name in sorted(updated & leaves.keys()):
        judge(leaves[name], copies[id(leaves[name])], name=f"{name} after the call")
    if grad:
        wanted = {name: t for name, t in leaves.items() if t.requires_grad}
        _check_gradients(got, want, wanted, {name: copies[id(t)] for name, t in wanted.items()}, judge)
        check_unchanged("backward")


def compare(
    got: Tensor, want: Tensor, *, name: str = "output", tolerance: Tolerance | None = None, terms: int = 1
) -> None:
    """Assert that ``got`` is ``want`` within ``tolerance`` (default: ``TOLERANCES`` of its dtype); integers are equal.

    Args:
        got: the result under test, any device.
        want: the reference, same shape; fp64 for a floating-point ``got``.
        name: name of the tensor in the message.
        tolerance: in place of ``TOLERANCES[got.dtype]``.
        terms: as in ``check_op``.

    Raises:
        AssertionError: shapes, NaNs, infinities or values differ.
    """
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape is {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.detach().cpu(), want.detach().cpu()
    if not got.is_floating_point():
        wrong = got != want
        if wrong.any():
            _fail(name, wrong.to(torch.int8), got, want, "no error")
        return
    rounded = want.to(got.dtype)  # where the reference overflows the dtype, infinity is right
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(got) != test(rounded)
        if differs.any():
            _fail(f"{name}: {kind} in different places", differs.to(torch.int8), got, want, "no difference")
    if got.numel() == 0:
        return
    tolerance = tolerance or TOLERANCES[got.dtype]
    compute = torch.float64 if got.dtype == torch.float64 else torch.float32
    want = torch.where(torch.isfinite(rounded), want.double(), 0.0)
    error = (torch.where(torch.isfinite(rounded), got.double(), 0.0) - want).abs()
    scale = tolerance.atol_scale + (math.sqrt(terms) * _eps(compute) if terms > 1 else 0.0)
    spacing = torch.finfo(got.dtype).smallest_normal * _eps(got.dtype)  # of subnormals: no result can be nearer
    allowed = scale * want.abs().max() + tolerance.rtol * want.abs() + spacing
    if (error > allowed).any():
        excess = error / allowed
        _fail(name, excess, got, want, allowed)


def _fail(name: str, badness: Tensor, got: Tensor, want: Tensor, allowed: Tensor | str) -> None:
    worst = int(badness.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), badness.shape))
    share = f"{int((badness >= 1).sum())} of {badness.numel()} elements differ"
    g, w = got[index].item(), want[index].item()
    limit = allowed if isinstance(allowed, str) else f"within {allowed[index].item():.3g}, error {abs(g - w):.3g}"
    raise AssertionError(f"{name}: {share}; worst at {index}: got {g!r}, want {w!r}, allowed {limit}")


def _check_form(got: dict, want: dict, inputs: list[Tensor], out_dtype: torch.dtype | Sequence[torch.dtype]) -> None:
    """Check the number of outputs, dtypes, and memory format: channels_last in, channels_last out."""
    if got.keys() != want.keys():
        raise AssertionError(f"outputs are {', '.join(got)}, expected {', '.join(want)}")
    floating = [name for name in got if want[name].is_floating_point()]
    dtypes = [out_dtype] * len(floating) if isinstance(out_dtype, torch.dtype) else list(out_dtype)
    expected = {name: t.dtype for name, t in want.items()} | dict(zip(floating, dtypes, strict=True))
    for name, t in got.items():
        if t.dtype != expected[name]:
            raise AssertionError(f"{name}: dtype is {t.dtype}, expected {expected[name]}")
    maps = [t for t in inputs if t.dim() == 4 and t.numel() > 0]
    if not maps or _format(maps[0]) is None:
        return
    for name, t in got.items():
        if t.dim() == 4 and not t.is_contiguous(memory_format=_format(maps[0])):
            raise AssertionError(
                f"{name}: strides {t.stride()} for shape {tuple(t.shape)}, "
                f"expected {_format(maps[0])} as the input ({maps[0].stride()})"
            )


def _format(x: Tensor) -> torch.memory_format | None:
    """The one memory format that ``x`` is dense in; None if neither, or if sizes of 1 leave both open."""
    formats = [f for f in (torch.contiguous_format, torch.channels_last) if x.is_contiguous(memory_format=f)]
    return formats[0] if len(formats) == 1 else None


def _check_gradients(got, want, leaves: dict[str, Tensor], ref_leaves: dict[str, Tensor], judge: Callable) -> None:
    live = [name for name, t in want.items() if t.requires_grad]
    for name in live:
        if not got[name].requires_grad:
            raise AssertionError(f"{name} does not require grad, the reference's does: the gradient is cut off")
    if not live or not leaves:
        return
    upstream = [torch.randn_like(got[name]) for name in live]
    kept = [_bits(dy).clone() for dy in upstream]
    grads = torch.autograd.grad([got[n] for n in live], list(leaves.values()), upstream, allow_unused=True)
    ref_upstream = [dy.detach().cpu().double() for dy in upstream]
    ref_grads = torch.autograd.grad([want[n] for n in live], list(ref_leaves.values()), ref_upstream, allow_unused=True)
    for dy, bits in zip(upstream, kept, strict=True):
        if not torch.equal(_bits(dy), bits):
            raise AssertionError("the upstream gradient was changed by the backward")
    for name, g, w in zip(leaves, grads, ref_grads, strict=True):
        if g is None and w is not None:
            raise AssertionError(f"gradient of {name} is missing: the op returned None for it")
        if g is not None:
            judge(g, torch.zeros_like(ref_leaves[name]) if w is None else w, name=f"gradient of {name}")


def _copy(value: Any, copies: dict[int, Tensor]) -> Any:
    """``value`` with fp64 CPU copies of its tensors; a tensor that occurs twice stays one tensor."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copy = value.detach().to("cpu", copy=True)
            copy = copy.double() if copy.is_floating_point() else copy
            copies[id(value)] = copy.requires_grad_(value.requires_grad)
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: _copy(item, copies) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_copy(item, copies) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _children(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
    if hasattr(value, "_fields"):
        return [(f"{name}.{key}", item) for key, item in zip(value._fields, value, strict=True)]
    if isinstance(value, (tuple, list)):
        return [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return []


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor in nested arguments."""
    if isinstance(value, Tensor):
        yield name, value
    for child, item in _children(value, name):
        yield from _leaves(item, child)


def _updated(value: Any, name: str = "") -> set[str]:
    """Names of the tensors that the call updates in place: the running statistics beside ``training=True``."""
    group = {child.rpartition(".")[2]: child for child, _ in _children(value, name)}
    items = dict(_children(value, name))
    names = {group[s] for s in _STATISTICS if s in group and items.get(group.get("training", "")) is True}
    return names.union(*(_updated(item, child) for child, item in items.items()))


def _outputs(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    return {f"output[{i}]": t for i, t in enumerate(result) if isinstance(t, Tensor)}


def _bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# ---------------------------------------------------------------------------------------------------------------------
# Guard zones and poison.

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_zones: list[list[tuple[Tensor, Tensor]]] = []  # one list of (allocation, buffer) per `guarded` block that is open


@contextmanager
def guarded() -> Iterator[None]:
    """Inside the block, dense buffers from torch's allocating functions lie between guard zones, checked at the end.

    Covers ``torch.empty``, ``empty_like``, ``empty_strided``, ``zeros``, ``zeros_like``, ``Tensor.new_empty`` and
    ``new_zeros`` called from Python, and what ``guard`` returned. Not thread-safe: it replaces torch's functions.

    Raises:
        AssertionError: an element before or after a buffer was overwritten; names the shape and the side.
    """
    owners = [(torch, n) for n in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")]
    owners += [(Tensor, n) for n in ("new_empty", "new_zeros")]
    originals = [(owner, n, getattr(owner, n), n in vars(owner)) for owner, n in owners]
    _zones.append([])
    try:
        for owner, n, original, _ in originals:
            setattr(owner, n, _planting(original))
        yield
    finally:
        for owner, n, original, own in originals:
            if own:
                setattr(owner, n, original)
            else:
                delattr(owner, n)
        zones = _zones.pop()
    for allocation, buffer in zones:  # not reached when the block raised: its own error says more
        _check_zones(allocation, buffer)


def guard(t: Tensor) -> Tensor:
    """A copy of ``t``, same strides, between guard zones: a read past the end gives NaN (integers: the minimum).

    Inside ``guarded()`` the zones are checked at the end of the block. Gaps between the elements of a strided ``t``
    hold the sentinel as well, unchecked.
    """
    return _plant(t)


@contextmanager
def poison() -> Iterator[None]:
    """Inside the block, torch fills new memory with NaN (integers: the maximum), so unwritten elements stay NaN."""
    saved = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # only warn: some references have no deterministic form
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(saved[0], warn_only=saved[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _planting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        t = original(*args, **kwargs)
        dense = t.layout == torch.strided and t.numel() == _span(t) > 0 and not t.is_meta
        return _plant(t) if dense and "out" not in kwargs else t

    return allocate


def _span(t: Tensor) -> int:
    """Elements from the first to the last one of ``t``, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _plant(t: Tensor) -> Tensor:
    if t.dtype == torch.bool or t.is_complex():
        return t.clone()  # no value of the dtype can serve as a sentinel
    allocation = torch.full((_span(t) + 2 * GUARD,), _sentinel(t.dtype), dtype=_INTEGERS[t.itemsize], device=t.device)
    whole = allocation.view(t.dtype)
    buffer = whole[:0].clone().set_(whole, GUARD, t.shape, t.stride())  # set_: what autograd calls a view it is not
    buffer.copy_(t.detach())
    if _zones:
        _zones[-1].append((allocation, buffer))
    return buffer.requires_grad_(t.requires_grad)


def _sentinel(dtype: torch.dtype) -> int:
    """The bits of a zone's element: a NaN that no arithmetic produces, or the least integer."""
    return -1 if dtype.is_floating_point else torch.iinfo(_INTEGERS[dtype.itemsize]).min


def _check_zones(allocation: Tensor, buffer: Tensor) -> None:
    for side, zone in (("before", allocation[:GUARD]), ("after", allocation[-GUARD:])):
        hit = (zone != _sentinel(buffer.dtype)).nonzero().flatten().tolist()
        if hit:
            first = GUARD - hit[-1] if side == "before" else hit[0] + 1
            raise AssertionError(
                f"{len(hit)} elements overwritten {side} a buffer of shape {tuple(buffer.shape)}, {buffer.dtype}: "
                f"the nearest {first} elements {'before its first' if side == 'before' else 'past its last'}"
            )
