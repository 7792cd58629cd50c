"""Walk through a network layer by layer, writing down what each kernel must do under one way of running it.

eager      one kernel per operator of PyTorch, channels_last, under bf16 autocast
compile    external convolutions; pointwise operators, resizes and concatenations fused into one kernel per chain
fused      BN, activation, residual and pooling in a convolution's epilogue; depthwise with pointwise; resize, unpooling
           and concatenation read at their sources by the next convolution; upsampling with argmax or the loss

Training adds the backward. A convolution costs three times its forward; weights, the optimizer and the image, whose
gradient nobody needs, are not treated apart. ``saved`` holds every tensor kept for the backward once.
"""

from dataclasses import dataclass, field

from benchmarks.roofline.floors import ITEM, Cost, Strategy, training_bytes
from benchmarks.roofline.op_floors import (
    argmax_kernels,
    argmax_of_logits,
    bilinear_macs,
    loss_of_logits,
    upsampled_loss,
)

CODE = 1 / 4  # bytes of a 2-bit pooling code
INDEX = 8  # bytes of an int64 index or label


@dataclass(frozen=True, eq=False)
class Map:
    """A feature map of the whole batch: (C, H, W) an image, and the bytes a consumer reads to have it."""

    C: int
    H: int
    W: int
    elements: int
    read: float


@dataclass
class Walk:
    """The kernels of one forward (and backward) pass, in order."""

    strategy: Strategy
    batch: int
    training: bool = False
    kernels: list[Cost] = field(default_factory=list)
    launches: int = 0
    flop: float = 0.0  # of the forward's convolutions; bilinear transposed convolutions count as interpolation
    saved: dict[object, float] = field(default_factory=dict)

    @property
    def eager(self) -> bool:
        return self.strategy == "eager"

    @property
    def fused(self) -> bool:
        return self.strategy == "fused"

    def map(self, C: int, H: int, W: int, read: float | None = None) -> Map:
        """A new map, stored in 16 bits unless ``read`` says what reading it costs."""
        elements = self.batch * C * H * W
        return Map(C, H, W, elements, ITEM * elements if read is None else read)

    def kernel(self, cost: Cost, launches: int = 1) -> None:
        """One kernel, or ``launches`` kernels that are not worth telling apart."""
        self.kernels.append(cost)
        self.launches += launches

    def both_ways(self, cost: Cost) -> None:
        """A kernel, and in training its mirror in the backward."""
        self.kernel(cost)
        if self.training:
            self.kernels.append(cost)

    def conv(
        self,
        x: Map,
        K: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        depthwise: bool = False,
        norm: bool = True,
        act: bool = True,
        residual: Map | None = None,
    ) -> Map:
        """Convolution with "same" padding [+ BN] [+ residual] [+ ReLU]."""
        height, width = -(-x.H // stride), -(-x.W // stride)
        y = self.map(K, height, width)
        weights = K * kernel_size**2 * (1 if depthwise else x.C)
        macs = y.elements * weights // K
        self.flop += 2 * macs
        work = Cost(fma=macs) if depthwise else Cost(tensor=2 * macs)
        if self.training:
            return self._train_conv(x, y, work, norm, act, residual)
        traffic = x.read + ITEM * (y.elements + weights)
        if self.fused:
            self.kernel(work + Cost(bytes=traffic + (residual.read if residual else 0)))
            return y
        self.kernel(work + Cost(bytes=traffic))
        self._pointwise(y, norm, act, residual)
        return y

    def separable(
        self, x: Map, K: int, *, stride: int = 1, mid: bool = True, act: bool = True, residual: Map | None = None
    ) -> Map:
        """Depthwise 3x3 [+ BN + ReLU], then pointwise + BN [+ ReLU] [+ residual]. Dilation moves no bytes."""
        if not self.fused:
            u = self.conv(x, x.C, 3, stride=stride, depthwise=True, norm=mid, act=mid)
            return self.conv(u, K, act=act, residual=residual)
        height, width = -(-x.H // stride), -(-x.W // stride)
        y, u = self.map(K, height, width), self.map(x.C, height, width)
        work = Cost(fma=9 * u.elements, tensor=2 * u.elements * K)
        self.flop += 2 * 9 * u.elements + work.tensor
        extra = residual.read if residual else 0
        if not self.training:
            self.kernel(work + Cost(bytes=x.read + ITEM * (y.elements + x.C * (9 + K)) + extra))
            return y
        # x is stored whole here: in training no resize is left to its reader.
        traffic = sum(training_bytes(x.elements, u.elements, y.elements, "fused").values()) + extra
        self.kernel(Cost(bytes=traffic, fma=3 * work.fma, tensor=3 * work.tensor))
        self._save(u)
        self._save(x)
        return y

    def pool(self, x: Map, *, keep: bool, codes: bool) -> Map:
        """2x2 max pooling, ceil mode. ``keep``: a skip connection reads ``x`` too. ``codes``: unpooled later."""
        y = self.map(x.C, -(-x.H // 2), -(-x.W // 2))
        code = CODE * y.elements if codes or self.training else 0
        if self.fused and not self.training:  # in the epilogue of the convolution that made x
            self.kernels[-1] += Cost(bytes=y.read + code - (0 if keep else x.read))
            return y
        index = {"eager": INDEX * y.elements, "compile": INDEX * y.elements if codes else y.elements, "fused": code}
        self.both_ways(Cost(bytes=x.read + y.read + index[self.strategy]))
        if self.training:
            self._save(("index", y), index[self.strategy])
            if self.eager:
                self._save(x)
        return y

    def unpool(self, x: Map, height: int, width: int) -> Map:
        """Max unpooling of 2x2 windows to (height, width)."""
        y = self.map(x.C, height, width)
        if self.fused:  # value and code, read by the next convolution; the mostly empty map never exists
            return self.map(x.C, height, width, read=x.read + CODE * x.elements)
        # Both inputs made contiguous, memset, scatter, back to channels_last: 6 hi + 38 lo (floors of op table D).
        self.kernel(Cost(bytes=6 * y.elements + 38 * x.elements), launches=5)
        if self.training:
            self.kernels.append(Cost(bytes=4 * y.elements + 40 * x.elements))
        return y

    def upsample(self, x: Map, height: int, width: int) -> Map:
        """Bilinear upsampling whose result is then concatenated."""
        if self.strategy == "compile" or (self.fused and not self.training):  # in the kernel that reads the result
            return self.map(x.C, height, width, x.read)
        y = self.map(x.C, height, width)
        self.both_ways(Cost(bytes=x.read + y.read))
        return y

    def concat(self, *maps: Map) -> Map:
        """Concatenation along the channels."""
        C, height, width = sum(m.C for m in maps), maps[0].H, maps[0].W
        read = sum(m.read for m in maps)
        if self.fused:
            return self.map(C, height, width, read)
        y = self.map(C, height, width)
        self.both_ways(Cost(bytes=read + y.read))
        return y

    def pooled_branch(self, x: Map, K: int) -> Map:
        """Image pooling of an ASPP: mean over the pixels, 1x1 + BN + ReLU, spread over the map again."""
        if not self.fused:  # the fused branches sum while they read x
            self.both_ways(Cost(bytes=x.read))
        vector = self.conv(self.map(x.C, 1, 1), K)
        if self.eager:
            return self.upsample(vector, x.H, x.W)
        return self.map(K, x.H, x.W, vector.read)

    def transposed(self, x: Map, K: int) -> Map:
        """2x2 transposed convolution of stride 2 with bias."""
        y = self.map(K, 2 * x.H, 2 * x.W)
        flop, weights = 2 * y.elements * x.C, 4 * x.C * K
        self.flop += flop
        times = 3 if self.training else 1
        traffic = x.read + y.read + (0 if self.training else ITEM * weights)
        self.kernel(Cost(bytes=times * traffic, tensor=times * flop))
        if self.training:
            self._save(x)
        return y

    def bilinear_add(self, x: Map, skip: Map) -> Map:
        """FCN: transposed convolution with bilinear weights, x2, plus a skip. Eager runs it as a dense C x C kernel."""
        y = self.map(x.C, skip.H, skip.W)
        if self.fused:
            self.both_ways(Cost(bytes=x.read + skip.read + y.read, fma=bilinear_macs(2) * y.elements))
            return y
        dense = Cost(bytes=x.read + y.read + ITEM * 16 * x.C**2, tensor=2 * 4 * x.C * y.elements)
        if self.eager:
            self.both_ways(dense)
            self.both_ways(Cost(bytes=3 * y.read))
        else:
            self.both_ways(dense + Cost(bytes=skip.read))
        return y

    def head(self, x: Map, height: int, width: int, *, dense: bool = False) -> None:
        """Logits to labels, or to the loss: upsampling to (height, width), then argmax or cross entropy.

        ``dense``: the upsampling is a transposed convolution with dense C x C weights, which compile cannot fuse.
        """
        pixels = self.batch * height * width
        hi = pixels * x.C
        if dense and not self.fused:
            # 2x2 inputs an output, all C of them each; in training the weights stay frozen.
            weights = (2 * (height // x.H) * x.C) ** 2
            self.both_ways(Cost(bytes=x.read + ITEM * (hi + weights), tensor=2 * 4 * x.C * hi))
            self.label(self.map(x.C, height, width))
            return
        if not self.training:
            for cost in argmax_kernels(x.elements, hi, pixels, self.strategy):
                self.kernel(cost)
            return
        self.kernel(upsampled_loss(x.elements, hi, pixels, self.strategy))
        self._save_loss(x, hi, pixels)

    def label(self, x: Map) -> None:
        """Logits of full size, just convolved, to labels or to the loss."""
        pixels = self.batch * x.H * x.W
        if self.training:
            self.kernel(loss_of_logits(x.elements, pixels, self.strategy))
            self._save_loss(x, x.elements, pixels)
        elif self.fused:  # in the epilogue of the classifier, which holds all classes of its pixels
            self.kernels[-1] += Cost(bytes=pixels - x.read)
        else:
            self.kernel(argmax_of_logits(x.elements, pixels))

    def _save_loss(self, x: Map, hi: int, pixels: int) -> None:
        """Labels, and the fp32 log-probabilities (eager) or logits and log-sum-exp."""
        self._save("labels", INDEX * pixels)
        self._save("loss", 4 * hi if self.eager else x.read + 4 * pixels)

    def _save(self, key: object, size: float | None = None) -> None:
        self.saved[key] = key.read if size is None else size

    def _pointwise(self, y: Map, norm: bool, act: bool, residual: Map | None) -> None:
        """Inference: BN, ReLU and addition as kernels of their own (eager) or as one (compile)."""
        if self.eager:
            for _ in range(norm + act):
                self.kernel(Cost(bytes=2 * y.read))
            if residual:
                self.kernel(Cost(bytes=3 * y.read))
        elif norm or act or residual:
            self.kernel(Cost(bytes=2 * y.read + (residual.read if residual else 0)))

    def _train_conv(self, x: Map, y: Map, work: Cost, norm: bool, act: bool, residual: Map | None) -> Map:
        """Forward, both gradients, and the passes of BN and ReLU: eager 3 + 5 and 2 + 3, compile 3 + 5 for both."""
        tripled = work + work + work
        self._save(x)
        if self.fused:
            reads, writes = (4, 5) if norm else (3, 3)
            self.kernel(tripled + Cost(bytes=reads * x.read + writes * y.read + (residual.read if residual else 0)))
            return y
        self.kernel(tripled + Cost(bytes=3 * (x.read + y.read)))
        if norm:
            self.kernel(Cost(bytes=8 * y.read))
            self._save(y)
        if act and (self.eager or not norm):
            self.kernel(Cost(bytes=5 * y.read))
        if residual:
            self.kernel(Cost(bytes=3 * y.read if self.eager else residual.read))
        if not norm:
            return y
        after = self.map(y.C, y.H, y.W)
        if act and self.eager:
            self._save(after)
        return after
