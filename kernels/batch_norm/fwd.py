"""Batch normalisation + residual + activation over a map in NHWC or NCHW memory, in one pass.

    forward    y = act((z - mean) rstd weight + bias + residual)       residual AFTER: act(...) + residual

The statistics come from ``stats.py`` or are fixed; the backward is ``bwd.py``. A map is walked in blocks of pixels x
channels. In NHWC the batch is one image of N*H*W pixels whose channels are neighbours in memory. In NCHW each image is
walked by itself, and pixels are neighbours. Only the offsets differ, so both are one kernel. Traffic in elements, M =
N*H*W: 2MC, 3MC with a residual.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg.kernels.common.norm_act import activate, norm_act
from fastseg.kernels.common.norm_args import Norm, norm_args
from fastseg.kernels.common.tiles import tile_and_block
from fastseg.kernels.runtime.config import Config, candidates, heuristic, select
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.runtime.sizes import cdiv, next_power_of_2
from fastseg.kernels.runtime.tensors import acc_dtype


class Walk(NamedTuple):
    """How the kernels walk a map: images of so many pixels, and whether channels are neighbours in memory."""

    last: bool
    images: int
    pixels: int
    C: int

    @classmethod
    def of(cls, z: Tensor) -> "Walk":
        """For z (N, C, H, W), dense in NHWC or NCHW memory. Where it is both, pixels of one channel are no rows."""
        N, C, H, W = z.shape
        if C > 1 and z.is_contiguous(memory_format=torch.channels_last):
            return cls(True, 1, N * H * W, C)
        return cls(False, N, H * W, C)

    def key(self, z: Tensor) -> dict:
        """The key for ``select``: ``inner`` is the length of the contiguous axis, in planes rounded to powers of 2."""
        inner = self.C if self.last else min(next_power_of_2(self.pixels), LONGEST)
        size = self.images * self.pixels
        return {"size": size, "device": z.device, "dtype": z.dtype, "inner": inner, "last": self.last}

    def blocks(self, cfg: Config) -> tuple[int, int]:
        """Blocks of pixels in an image, and in the batch."""
        blocks = cdiv(self.pixels, cfg.BLOCK_M)
        return blocks, self.images * blocks

    def reduction(self, cfg: Config) -> tuple[int, int, int, int]:
        """The same, blocks that each program of a reduction walks, and programs along that axis."""
        blocks, total = self.blocks(cfg)
        steps = max(rows_per_program(total, 1, cdiv(self.C, cfg.BLOCK_C)), 1)
        return blocks, total, steps, cdiv(total, steps)


@triton.jit
def tile_of(step, blocks, pixels, offs_c, C: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Block ``step`` of a batch, ``blocks`` to an image: -> where it begins (int64), offsets (BLOCK_M, channels) from
    there, which of its pixels are inside (BLOCK_M,)."""
    offs_m = tl.arange(0, BLOCK_M)
    if LAST:
        row0 = step.to(tl.int64) * BLOCK_M
        start = row0 * C
        offs = offs_m[:, None] * C + offs_c[None, :]
    else:
        row0 = (step % blocks).to(tl.int64) * BLOCK_M
        start = (step // blocks).to(tl.int64) * C * pixels + row0
        offs = offs_c[None, :].to(tl.int64) * pixels + offs_m[:, None]
    return start, offs, row0 + offs_m < pixels


@triton.jit(do_not_specialize=["blocks"])
def _batch_norm_act_fwd_kernel(
    z_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, residual_ptr,
    pixels, blocks,
    y_ptr,
    EPS: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid, block = tile_and_block(tl.cdiv(C, BLOCK_C))
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start, offs, inside = tile_of(pid, blocks, pixels, offs_c, C, LAST, BLOCK_M)
    mask = inside[:, None] & mask_c[None, :]  # (BLOCK_M, BLOCK_C)

    z = tl.load(z_ptr + start + offs, mask=mask, other=0.0).to(ACC)
    FIRST: tl.constexpr = "none" if RESIDUAL == "before" else ACT
    y = norm_act(z, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs_c, mask_c, EPS, True, AFFINE, FIRST, ACC)
    if RESIDUAL != "none":
        y += tl.load(residual_ptr + start + offs, mask=mask, other=0.0).to(ACC)
    if RESIDUAL == "before":
        y = activate(y, ACT)
    tl.store(y_ptr + start + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def batch_norm_act_fwd(
    z: Tensor, norm: Norm, act: str, residual: Tensor | None, where: Literal["before", "after"] = "before"
) -> Tensor:
    """z (N, C, H, W) in NHWC or NCHW memory, residual the same or None -> y: the same. ``where``: of the activation."""
    y = torch.empty_like(z)
    if z.numel() == 0:
        return y
    args, _, affine = norm_args(norm, z)
    *vectors, eps = args
    walk = Walk.of(z)
    cfg = select("batch_norm_act_fwd", **walk.key(z))
    blocks = -(-walk.pixels // cfg.BLOCK_M)  # a call less than ``walk.blocks``, and than ``cdiv``, each
    launch(
        _batch_norm_act_fwd_kernel, (walk.images * blocks * -(-walk.C // cfg.BLOCK_C),),
        z, *vectors, z if residual is None else residual, walk.pixels, blocks, y,
        EPS=eps, C=walk.C, LAST=walk.last, AFFINE=affine, ACT=act, RESIDUAL="none" if residual is None else where,
        ACC=acc_dtype(z), **cfg.launch,
    )  # fmt: skip
    return y


PROGRAMS = 1024  # of a reduction: about 8 for each SM of an H200, and few enough that their partial sums stay small


def rows_per_program(M: int, block: int, others: int) -> int:
    """Rows that each program of a reduction walks, a multiple of ``block``; ``others``: programs on the other axes."""
    return cdiv(cdiv(M, max(PROGRAMS // others, 1)), block) * block


LONGEST = 2048  # pixels of a plane in one block: then it has one channel, whose vectors are scalars


@heuristic("batch_norm_act_fwd")
@heuristic("batch_norm_act_bwd_reduce")
@heuristic("batch_norm_act_bwd_input")
@heuristic("batch_norm_tile_stats")
def _config(size: int, inner: int, last: bool, dtype: torch.dtype) -> dict[str, int]:
    """4096 elements a program: 32 a thread, so that each thread has several 16-byte loads in flight.

    64 channels are a line of 128 bytes. Of planes up to 512 pixels, and half as many elements: planes of odd sizes, 7x7
    or 65x65 pixels, are read element by element, whose addresses would spill, and with 1024 pixels and two channels the
    reduction of 32x32 planes spills on sm_100.
    """
    if last:
        block_c = min(64, max(16, next_power_of_2(inner)))
        return {"BLOCK_M": 4096 // block_c, "BLOCK_C": block_c, "num_warps": 4}
    block_m = min(512, max(16, inner))
    return {"BLOCK_M": block_m, "BLOCK_C": 2048 // block_m, "num_warps": 4}


@candidates("batch_norm_act_fwd")
@candidates("batch_norm_act_bwd_reduce")
@candidates("batch_norm_act_bwd_input")
@candidates("batch_norm_tile_stats")
def _candidates(size: int, inner: int, last: bool, dtype: torch.dtype) -> list[dict[str, int]]:
    lengths = (32, 64, 128) if last else sorted({min(inner, length) for length in (256, 1024, 2048)})
    names = ("BLOCK_M", "BLOCK_C") if last else ("BLOCK_C", "BLOCK_M")
    return [
        dict(zip(names, (elements // length, length), strict=True)) | {"num_warps": warps}
        for elements in (1024, 2048, 4096, 8192)
        for length in lengths
        for warps in (4, 8)
        if length <= elements
    ]
