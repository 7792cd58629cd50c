"""Batch norm, residual and activation as a module, for one process or many."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.overrides import has_torch_function_unary

from fastseg.nn.fuse.children import batch_norm_args, check_activations
from fastseg.nn.leaf import leaf
from fastseg.ops import batch_norm_act
from fastseg.ops.core.explain import UNFUSED_DEPTH, in_unfused
from fastseg.ops.core.norm import Activation, activate


class BatchNormAct2d(nn.BatchNorm2d):
    """As ``torch.nn.BatchNorm2d``; differences: a residual and an activation may follow, in the same op.

    The ``state_dict`` is that of ``BatchNorm2d``. With kernels, the backward saves the input and no activated map.

    With ``sync``, training uses the statistics of all processes, as in ``torch.nn.SyncBatchNorm``, on CPUs too. Without
    a process group, or in evaluation, it changes nothing. ``fastseg.nn.SyncBatchNorm.convert_sync_batchnorm`` sets it
    throughout a model. torch's own converter would build a norm without the activation, so it gets an error.

    Args:
        num_features: C of the (N, C, H, W) input.
        eps: added to the variance.
        momentum: of the running statistics; None averages cumulatively.
        affine: True for a weight and a bias.
        track_running_stats: True for running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        act: None, "relu", "relu6" or "leaky_relu".
        sync: True to share batch statistics between processes.
        process_group: the processes that share them; None means all.
        options: further keywords of this torch's ``BatchNorm2d``.

    Raises:
        ValueError: the activation is unknown.

    Reference: Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167.

    Example:
        >>> norm = BatchNormAct2d(16)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> norm(x, residual=x).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: Activation | None = "relu",
        sync: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        **options: bool,
    ):
        check_activations("BatchNormAct2d", act=act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.act, self.sync, self.process_group = act, sync, process_group

    @leaf
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input: (N, C, H, W); residual: (N, C, H, W), added before the activation."""
        if not has_torch_function_unary(input):  # a tracer's proxy has no dimensions to check
            self._check_input_dim(input)
        group = self._group()
        if UNFUSED_DEPTH[0] and group is None and in_unfused():
            y = super().forward(input)
            return activate(y if residual is None else y + residual, self.act)
        return batch_norm_act(input, batch_norm_args(self), self.act, residual, process_group=group)

    def _group(self) -> "dist.ProcessGroup | None":
        """The process group whose statistics to share at present."""
        if not (self.sync and self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name != "qconfig"]  # torch.jit.trace reads all that is listed

    @property
    def qconfig(self):
        """Read by torch's SyncBatchNorm converter, which copies it, and by torch's quantisation."""
        if "qconfig" not in vars(self) and self.act is not None:
            raise TypeError(
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation of a BatchNormAct2d; "
                "call fastseg.nn.SyncBatchNorm.convert_sync_batchnorm. For torch's quantisation, which leaves it, "
                "set qconfig to None"
            )
        if "qconfig" not in vars(self):
            raise AttributeError("BatchNormAct2d has no qconfig")
        return vars(self)["qconfig"]

    @qconfig.setter
    def qconfig(self, value) -> None:
        vars(self)["qconfig"] = value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}" + (", sync=True" if self.sync else "")


class SyncBatchNorm(nn.SyncBatchNorm):
    """As ``torch.nn.SyncBatchNorm``; differences: ``convert_sync_batchnorm`` makes norms that stay fused, on CPUs too.

    Example:
        >>> net = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(8), nn.BatchNorm2d(8)))
        >>> net[0].sync, net[0].act
        (True, 'relu')
    """

    forward = leaf(nn.SyncBatchNorm.forward)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> nn.Module:
        """As torch's, except that a ``BatchNorm2d`` becomes a ``BatchNormAct2d`` without activation, which ops can
        fuse.
                A ``BatchNormAct2d`` stays and is set to sync. Other batch norms become torch's ``SyncBatchNorm``.
        """
        if type(module) is nn.BatchNorm2d:
            norm = BatchNormAct2d(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, "meta",
                act=None,
            )  # fmt: skip
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                setattr(norm, name, tensor)
            module = norm.train(module.training)
        if isinstance(module, BatchNormAct2d):
            module.sync, module.process_group = True, process_group
            return module
        return super().convert_sync_batchnorm(module, process_group)
