"""Values of Triton's IR, computed: Python numbers for scalars, torch's tensors for blocks, None where it is unknown."""

import math
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pointer(NamedTuple):
    """An address, or a block of them: the argument it begins at, and bytes from there (None: not known)."""

    name: str
    offset: object


_SHAPE = re.compile(r"tensor<((?:\d+x)+)")
_BYTES = re.compile(r"!tt\.ptr<[a-z]+(\d+)>")


def scalar(given: object) -> object:
    """An argument of a launch."""
    return given if isinstance(given, int | float) else None


def _divided(a, b):
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return torch.div(a, torch.where(b == 0, 1, b), rounding_mode="trunc")
    q = abs(a) // abs(b) if b else 0
    return q if (a >= 0) == (b >= 0) else -q


def _either(fn: Callable, on_tensors: Callable) -> Callable:
    """``fn`` of numbers, ``on_tensors`` where one is a block."""

    def call(*args):
        if any(isinstance(a, Tensor) for a in args):
            return on_tensors(*map(torch.as_tensor, args))
        return fn(*args)

    return call


_BINARY: dict[str, Callable] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "addf": operator.add, "subf": operator.sub,
    "mulf": operator.mul, "divsi": _divided, "divui": _divided, "remsi": lambda a, b: a - _divided(a, b) * b,
    "remui": lambda a, b: a - _divided(a, b) * b, "floordivsi": operator.floordiv,
    "divf": _either(lambda a, b: a / b if b else math.inf, torch.divide),
    "andi": operator.and_, "ori": operator.or_, "xori": operator.xor, "shli": operator.lshift,
    "shrsi": operator.rshift, "shrui": operator.rshift,
    "maxsi": _either(max, torch.maximum), "minsi": _either(min, torch.minimum),
    "maxui": _either(max, torch.maximum), "minui": _either(min, torch.minimum),
    "maxnumf": _either(max, torch.maximum), "minnumf": _either(min, torch.minimum),
    "maximumf": _either(max, torch.maximum), "minimumf": _either(min, torch.minimum),
}  # fmt: skip
_COMPARED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
             "ge": operator.ge}  # fmt: skip
_SAME = {"arith.extsi", "arith.trunci", "arith.index_cast", "arith.extf", "arith.truncf"}
_REDUCED = {"arith.addi": torch.sum, "arith.addf": torch.sum, "arith.maxsi": torch.amax, "arith.minsi": torch.amin,
            "arith.maxnumf": torch.amax, "arith.ori": torch.amax}  # fmt: skip


def computed(name: str, text: str, uses: list[object]) -> object:
    """The result of one operation without side effects; None if it, or an operand that matters, is not known."""
    kind = name.split(".")[-1]
    if name == "arith.constant":
        return _constant(text)
    if name == "tt.make_range":
        return torch.arange(
            int(re.search(r"start = (-?\d+)", text)[1]), int(re.search(r"end = (-?\d+)", text)[1]), dtype=torch.int64
        )
    if name == "arith.andi" and any(u is False for u in uses):
        return False
    if name == "arith.select":
        return _selected(*uses)
    if name == "tt.addptr":
        return _moved(text, *uses)
    if not uses or any(u is None for u in uses):
        return None
    if name in ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "tt.unsplat", "tt.join"):
        return _shaped(name, text, uses)
    if any(isinstance(u, Pointer) for u in uses):
        return None
    if kind in _BINARY:
        return _BINARY[kind](*uses)
    if name in ("arith.cmpi", "arith.cmpf"):
        return _COMPARED[re.search(r"cmp[if] (?:fastmath<\w+>, )?[suo]?(\w\w)", text)[1]](*uses)
    if name in ("arith.sitofp", "arith.uitofp"):
        return _either(float, lambda a: a.to(torch.float64))(uses[0])
    if name in _SAME:
        return uses[0]
    if name == "arith.extui":
        return _either(int, lambda a: a.to(torch.int64))(uses[0])
    if name == "arith.fptosi":
        return _either(lambda a: int(a) if math.isfinite(a) else 0, lambda a: a.to(torch.int64))(uses[0])
    if name == "arith.negf":
        return -uses[0]
    if name == "math.floor":
        return _either(math.floor, torch.floor)(uses[0])
    if name == "math.ceil":
        return _either(math.ceil, torch.ceil)(uses[0])
    if name == "math.fma":
        return uses[0] * uses[1] + uses[2]
    if name in ("math.absi", "math.absf"):
        return abs(uses[0])
    return None


def _constant(text: str) -> object:
    found = re.search(r"arith\.constant (dense<)?([-+.\w]+)>? : (\S+)", text)
    if found is None:
        return {"true": True, "false": False}.get(text.rsplit(" ", 1)[-1])
    raw, type_ = found[2], found[3]
    if raw in ("true", "false"):
        value: object = raw == "true"
    elif raw.startswith("0x") or raw.startswith("0X"):
        return None  # bits of a float that is no number
    elif re.fullmatch(r"-?\d+", raw):
        value = int(raw)
    else:
        value = float(raw)
    return torch.full(_shape(type_), value) if found[1] else value


def _shape(text: str) -> list[int]:
    found = _SHAPE.search(text)
    return [int(side) for side in found[1].split("x")[:-1]] if found else []


def _shaped(name: str, text: str, uses: list[object]) -> object:
    value = uses[0]
    if isinstance(value, Pointer):
        moved = None if value.offset is None else _shaped(name, text, [value.offset])
        return Pointer(value.name, moved)
    value = torch.as_tensor(value)
    shape = _shape(text.split("->")[-1])
    if name == "tt.expand_dims":
        return value.unsqueeze(int(re.search(r"axis = (\d+)", text)[1]))
    if name == "tt.trans":
        return value.permute([int(i) for i in re.search(r"order = array<i32: ([\d, ]+)>", text)[1].split(",")])
    if name == "tt.join":
        return torch.stack(torch.broadcast_tensors(value, torch.as_tensor(uses[1])), -1)
    if name == "tt.unsplat":
        return value.flatten()[0].item()
    return value.reshape(shape) if name == "tt.reshape" else value.expand(shape)


def _selected(condition: object, a: object, b: object) -> object:
    if isinstance(condition, bool):
        return a if condition else b
    if condition is None or a is None or b is None or isinstance(a, Pointer) or isinstance(b, Pointer):
        return a if isinstance(a, Pointer) and isinstance(b, Pointer) and a.name == b.name and a == b else None
    return torch.where(condition, torch.as_tensor(a), torch.as_tensor(b))


def _moved(text: str, pointer: object, offset: object) -> object:
    if not isinstance(pointer, Pointer):
        return None
    if pointer.offset is None or offset is None:
        return Pointer(pointer.name, None)
    return Pointer(pointer.name, pointer.offset + offset * max(int(_BYTES.search(text)[1]) // 8, 1))


def reduced(text: str, how: str, value: object) -> list[object]:
    """``tt.reduce`` of one block."""
    if not isinstance(value, Tensor) or how not in _REDUCED:
        return []
    out = _REDUCED[how](value, dim=int(re.search(r"axis = (\d+)", text)[1]))
    return [out.item() if out.ndim == 0 else out]
