"""Run an existing batch norm, a residual and an activation as one op."""

from torch import Tensor, nn
from torch import distributed as dist

from fastseg.nn.fuse.children import Act, batch_norm_args
from fastseg.nn.fuse.watch import apply_act, split_act, watched
from fastseg.nn.norm import BatchNormAct2d
from fastseg.ops import batch_norm_act
from fastseg.ops.core.dispatch import record_reference


def watched_norm(norm: nn.BatchNorm2d) -> str:
    """As ``watched``, but a ``BatchNormAct2d`` without activation counts as a ``BatchNorm2d``."""
    return watched(norm, BatchNormAct2d if type(norm) is BatchNormAct2d and norm.act is None else nn.BatchNorm2d)


def norm_group(norm: nn.BatchNorm2d) -> "dist.ProcessGroup | None":
    """The processes that share statistics with ``norm`` at present."""
    return norm._group() if isinstance(norm, BatchNormAct2d) else None


def run_norm_act(x: Tensor, norm: nn.Module, act: Act, residual: Tensor | None = None) -> Tensor:
    """Compute ``act(norm(x) + residual)`` with an existing ``norm``, as one op.

    A norm that the op cannot replace (torch's SyncBatchNorm, another norm, one with hooks) is called first. An
    activation that the op does not have is called on the result.
    """
    own = type(norm) is BatchNormAct2d
    why = watched_norm(norm) if own else watched(norm, nn.BatchNorm2d)
    if not why:
        name, module = split_act(act) if isinstance(act, nn.Module) else (act, None)
        group = norm_group(norm) if own else None
        y = batch_norm_act(x, batch_norm_args(norm), name, residual, process_group=group)
        return y if module is None else module(y)
    record_reference("batch_norm_act", x, why)
    y = norm(x)
    return apply_act(act, y if residual is None else y + residual)
