"""Trace an answer: one graph for any batch, height and width where the model allows it."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fastseg.exporting.answer import Answer
from fastseg.io.files import first_line
from fastseg.io.quiet import quiet
from fastseg.ops.core.register import DECOMPOSITIONS

MORE = 32  # pixels: what strides divide


class Traced(NamedTuple):
    """A graph of torch's own ops, the input that it was traced on, the place of each axis in it, the free ones, and why
    others are not free.
    """

    program: ExportedProgram
    example: Tensor
    axes: dict[str, int]
    free: tuple[str, ...]
    why: str


def traced(answer: Answer, x: Tensor) -> Traced:
    """Trace an answer on ``x``, an input of it, with all axes free that the model and ``torch.export`` leave free.

    Raises:
        ValueError: ``torch.export`` cannot trace the model at all.
    """
    places, why = answer.axes, ""
    asked = {}
    for name, place in places.items():
        try:
            answer(larger(x, {place}))
            asked[place] = Dim.AUTO
        except Exception as error:  # whatever the model raises at this size
            why = why or f"at another {name} the model fails: {first_line(error)}"
    several = torch.cat([x, x]) if places["batch"] in asked and x.shape[0] == 1 else x  # 1 would become a constant
    try:
        with quiet(printed=False):
            program = torch.export.export(answer, (several,), dynamic_shapes=(asked,) if asked else None)
    except Exception as error:  # torch.export raises whatever the model, Dynamo or a shape raises
        return traced_as_it_is(answer, x, first_line(error))
    shape = _input_shape(program)
    free = tuple(name for name, place in places.items() if not isinstance(shape[place], int))
    if "batch" not in free and several is not x:  # two pictures are not the example
        return traced_as_it_is(answer, x, "torch.export fixes the batch")
    if not why and len(free) < len(places):
        why = f"torch.export fixes {' and '.join(name for name in places if name not in free)}"
    return Traced(program.run_decompositions(DECOMPOSITIONS), several, places, free, why)


def traced_as_it_is(answer: Answer, x: Tensor, why: str) -> Traced:
    """Trace an answer at the size of ``x`` alone.

    Raises:
        ValueError: ``torch.export`` cannot trace the model.
    """
    try:
        with quiet(printed=False):
            program = torch.export.export(answer, (x,))
    except Exception as error:
        name = type(answer.model).__name__
        raise ValueError(f"export: torch.export cannot trace {name}: {first_line(error)}") from error
    return Traced(program.run_decompositions(DECOMPOSITIONS), x, answer.axes, (), why)


def larger(x: Tensor, places: Collection[int], pixels: int = MORE) -> Tensor:
    """Values like those of ``x``: one more picture, and ``pixels`` more a side, at these places of the shape."""
    shape = [n + (place in places) * (1 if place == 0 else pixels) for place, n in enumerate(x.shape)]
    generator = torch.Generator().manual_seed(0)
    if x.dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(x.device)
    return torch.randn(shape, generator=generator).to(x)


def _input_shape(program: ExportedProgram) -> tuple[int | torch.SymInt, ...]:
    name = program.graph_signature.user_inputs[0]
    return next(tuple(node.meta["val"].shape) for node in program.graph.nodes if node.name == name)
