"""The sizes of a convolution."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """Sizes in elements and pixels: x (N, C, H, W) -> y (N, COUT, OH, OW), K x K taps."""

    N: int
    C: int
    H: int
    W: int
    COUT: int
    OH: int
    OW: int
    K: int
    stride: int
    padding: int
    dilation: int

    @property
    def pixels(self) -> int:
        return self.N * self.OH * self.OW

    @property
    def phased(self) -> bool:
        """Whether tiles take pixels ``dilation`` apart, which share their taps."""
        return self.dilation > 1 and self.stride == 1 and self.K > 1

    def unsupported(self) -> str:
        """Why the kernels cannot take these sizes, or ""."""
        largest = max(self.H * self.W * self.C, self.OH * self.OW * max(self.C, self.COUT))
        if largest >= 2**31:
            return f"one image has {largest} elements; kernels address 2^31 within an image"
        return ""
