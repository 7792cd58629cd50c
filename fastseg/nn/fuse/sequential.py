"""A ``Sequential`` that runs each convolution, norm and activation as one op, unless they are watched."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fastseg.nn.fuse.conv_norm_act import convolve, run_conv_norm_act
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.watch import FUSED_ACTS, watched
from fastseg.nn.norm import BatchNormAct2d

NORMS = (nn.BatchNorm2d, BatchNormAct2d)


class Sequential(nn.Sequential):
    """As ``torch.nn.Sequential``; difference: a ``Conv2d``, the ``BatchNorm2d`` and the activation after it are one op.

    In evaluation the norm is folded into the convolution, as in ``ConvNormAct2d``. A child that is another module, has
    hooks, or has options that the op lacks is called.

    Example:
        >>> Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """

    def forward(self, input: Tensor, *, taps: dict[int, Tensor | None] | None = None) -> Tensor:
        """Return the last child's output. ``taps``, with ascending keys, gets the output of the child at each key."""
        layers, start = list(self._modules.values()), 0  # what ``list(self)`` gives, in two calls less
        for i in taps or ():
            taps[i] = input = run_layers(input, layers[start : i + 1])
            start = i + 1
        return run_layers(input, layers[start:])


PLAIN_FORWARDS = (nn.Sequential.forward, Sequential.forward)  # of a class that does not replace it


class Group(NamedTuple):
    """Consecutive children that can run as one op; ``stop`` is the index after them."""

    conv: nn.Conv2d | None
    norm: nn.BatchNorm2d | None
    act: nn.Module | None
    stop: int


def next_group(layers: Sequence[nn.Module], start: int = 0) -> Group:
    """Find the convolution, batch norm and activation that begin at index ``start``, as many as there are.
    Without any, ``stop`` is ``start``. The caller must check if they are watched.
    """
    conv = norm = act = None
    stop, count = start, len(layers)
    if stop < count and type(layers[stop]) is nn.Conv2d:
        conv, stop = layers[stop], stop + 1
    if stop < count and type(layers[stop]) in NORMS:
        norm, stop = layers[stop], stop + 1
    if start < stop < count and type(layers[stop]) in FUSED_ACTS:
        act, stop = layers[stop], stop + 1
    return Group(conv, norm, act, stop)


def run_layers(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """Run the modules one after another, in groups."""
    place = 0
    while place < len(layers):
        layer = layers[place]
        alone = type(layer) is not nn.Conv2d and type(layer) not in NORMS
        conv, norm, act, stop = (None, None, None, place + 1) if alone else next_group(layers, place)
        if alone:
            idle = type(layer) is nn.Dropout and not layer.training and not watched(layer, nn.Dropout)
            x = x if idle else layer(x)
        elif conv is None:
            x = run_norm_act(x, norm, act)
        elif stop == place + 1:
            x = convolve(conv, x)
        else:
            x = run_conv_norm_act(x, conv, norm, act)
        place = stop
    return x


def opened(module: nn.Module) -> list[nn.Module] | None:
    """The children of a ``Sequential``, to be run in its place; None if it is watched and must be called.

    A subclass counts if it does not replace ``forward``.
    """
    plain = isinstance(module, nn.Sequential) and type(module).forward in PLAIN_FORWARDS
    return None if not plain or watched(module, type(module)) else list(module._modules.values())


def run_tapped(module: nn.Module, x: Tensor, taps: dict[int, Tensor | None]) -> Tensor:
    """Return ``module(x)``; ``taps`` gets the outputs of its children at its keys.

    If the module is not a plain ``Sequential``, hooks record the outputs.
    """
    if type(module) is Sequential and "forward" not in vars(module):
        return module(x, taps=taps)
    with ExitStack() as notes:
        for i in taps:
            notes.enter_context(noting(module, str(i), partial(taps.__setitem__, i)))
        return module(x)


@contextmanager
def noting(module: nn.Module, child: str, note: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block, call ``note`` with the output of ``child`` of ``module``; not while tracing."""
    hook = module.get_submodule(child).register_forward_hook(lambda child, args, out: note(out))
    try:
        yield
    finally:
        hook.remove()
