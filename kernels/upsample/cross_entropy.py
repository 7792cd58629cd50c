"""Cross entropy of bilinearly upsampled logits; neither these nor their gradient are ever stored.

    v_c  = (1 - u) ((1 - t) a_c + t b_c) + u ((1 - t) c_c + t d_c)      a, b, c, d: the corners of the pixel's cell
    lse  = log sum_c exp v_c
    loss = (1 - e) w_k (lse - v_k) + e / C sum_c w_c (lse - v_c)        k: the pixel's target, e: label smoothing
    dv_c = F exp(v_c - lse) - (1 - e) w_k [c = k] - e / C w_c,          F = (1 - e) w_k + e / C sum_c w_c

    dx   = the transpose of the interpolation, applied to dv: each low-resolution pixel gathers from the outputs of the
           four cells around it, in a fixed order. No atomics: two runs give the same bits.

Forward keeps lse - log F, one number a pixel, inf where the target is ignored: exp(v - it) is then F p, or 0, and the
backward reads no other factor but the target's. Logits are interpolated in units of log 2.

Forward: a program owns rows of one cell row and BLOCK_W columns. The lerps along x are shared by its rows; the softmax
is online over blocks of classes. sum_c w_c v_c needs no value of its own: it is the interpolation of sum_c w_c a_c.

Backward: a program owns a block of classes and a strip of low-resolution pixels, and walks down a segment of their
rows. A lane owns a cell: its corners and their gradients stay in registers while its outputs pass by. One column of
cells and one cell row are computed twice at the border of a strip and of a segment.

Traffic in elements: forward reads N C h w logits and N H W targets, writes N H W of lse; backward reads the three,
targets and lse once for each block of classes (from L2), writes N C h w. Arithmetic bounds both, not memory: for an
output value of 150 classes at a factor of 4, the inner loops have 1.1 and 1 exponentials among 13 and 18 instructions
(sm_90, Triton 3.7.1), the backward about 15 where no target of the tile lies in the block of classes. An exponential
takes its unit as long as 8 other instructions take theirs.
"""

from fastseg.kernels.upsample.cross_entropy_bwd import upsample_cross_entropy_bwd
from fastseg.kernels.upsample.cross_entropy_fwd import upsample_cross_entropy_fwd

__all__ = ["upsample_cross_entropy_bwd", "upsample_cross_entropy_fwd"]
