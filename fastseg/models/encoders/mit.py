"""Mix Transformer (Xie et al., arXiv:2105.15203): the encoder of SegFormer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models.encoders.widths import scaled
from fastseg.nn.fuse.conv_norm_act import convolve

# Variant: widths of the four stages, and blocks of each.
VARIANTS = {
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
MLP_RATIO = 4


class MixTransformer(nn.Module):
    """MiT-B0 to B5, with the names of Hugging Face's files.

    Tokens are kept as (N, h, w, C), which is a map in channels_last: neither convolutions nor linear layers copy them.

    Args:
        variant: "mit_b0" to "mit_b5".
        in_channels: channels of the image.
        width: multiplier of every width; the results are rounded to multiples of 8 and of the heads.
        heads: attention heads of the four stages.
        reductions: stride of the convolution that makes the keys and values of each stage from its map.
        drop_path: probability, of the last block, of leaving out a residual branch of an image in training; it grows
            linearly from 0.

    Attributes:
        out_channels: the widths of what ``forward`` returns: maps at strides 4, 8, 16 and 32.

    Raises:
        ValueError: the value of an option is out of range; in ``forward``, the image is smaller than a stage's stride
            times its reduction.

    Example:
        >>> [tuple(f.shape[1:]) for f in MixTransformer("mit_b0")(torch.randn(1, 3, 64, 96))]
        [(32, 16, 24), (64, 8, 12), (160, 4, 6), (256, 2, 3)]
    """

    def __init__(
        self,
        variant: str = "mit_b0",
        in_channels: int = 3,
        width: float = 1.0,
        *,
        heads: Sequence[int] = HEADS,
        reductions: Sequence[int] = REDUCTIONS,
        drop_path: float = 0.1,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"MixTransformer: no variant {variant!r}; use one of {', '.join(VARIANTS)}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"MixTransformer: drop_path is {drop_path}; use 0 up to below 1")
        for option, values in (("heads", heads), ("reductions", reductions)):
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"MixTransformer: {option} is {tuple(values)}; use four positive numbers")
        nominal, depths = VARIANTS[variant]
        widths = [
            _divisible(scaled(n, width, "MixTransformer"), count) for n, count in zip(nominal, heads, strict=True)
        ]
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        self.out_channels = widths
        self.patch_embeddings = nn.ModuleList(
            _PatchEmbedding(before, after, size, stride)
            for before, after, size, stride in zip(
                [in_channels, *widths], widths, (7, 3, 3, 3), (4, 2, 2, 2), strict=False
            )
        )
        self.block = nn.ModuleList()
        for channels, depth, count, reduction in zip(widths, depths, heads, reductions, strict=True):
            stage = (Block(channels, count, reduction, rates.pop(0)) for _ in range(depth))
            self.block.append(nn.ModuleList(stage))
        self.layer_norm = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        self._least = max([1, *(4 * 2**i * reduction for i, reduction in enumerate(reductions) if reduction > 1)])
        self._init()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) -> (N, C_i, ceil(H / s), ceil(W / s)) for s = 4, 8, 16, 32, in channels_last."""
        if min(x.shape[-2:]) < self._least:
            size = "x".join(str(int(n)) for n in x.shape[-2:])
            raise ValueError(f"MixTransformer: the image is {size}; its sides must be {self._least} pixels or more")
        features = []
        for embed, blocks, norm in zip(self.patch_embeddings, self.block, self.layer_norm, strict=True):
            tokens = embed(x)
            for block in blocks:
                tokens = block(tokens)
            x = as_map(norm(tokens))
            features.append(x)
        return features

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(module.bias)


def as_map(tokens: Tensor) -> Tensor:
    """(N, h, w, C) -> the same memory as a map (N, C, h, w)."""
    return tokens.permute(0, 3, 1, 2)


def as_tokens(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h, w, C), the same memory if ``x`` is in channels_last."""
    return x.permute(0, 2, 3, 1)


def _divisible(channels: int, heads: int) -> int:
    return -(-channels // heads) * heads


class _PatchEmbedding(nn.Module):
    """Overlapping patches: a strided convolution, and a norm over channels."""

    def __init__(self, in_channels: int, channels: int, size: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, size, stride=stride, padding=size // 2)
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(as_tokens(convolve(self.proj, x)))


class _Attention(nn.Module):
    """Attention whose keys and values come from the map at a ``reduction`` of its size."""

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.sr: nn.Module | None = None
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, stride=reduction)
            self.layer_norm = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        source = tokens if self.sr is None else self.layer_norm(as_tokens(convolve(self.sr, as_map(tokens))))
        split = lambda y: y.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            split(self.query(tokens)), split(self.key(source)), split(self.value(source))
        )
        return y.transpose(1, 2).reshape(tokens.shape)


class _MixFFN(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution between them, which tells tokens where they are."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = MLP_RATIO * channels
        self.dense1 = nn.Linear(channels, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.intermediate_act_fn = nn.GELU()
        self.dense2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        y = as_tokens(convolve(self.dwconv["dwconv"], as_map(self.dense1(tokens))))
        return self.dense2(self.intermediate_act_fn(y))


class Block(nn.Module):
    """A transformer block: attention and Mix-FFN, each behind a norm and beside a residual.

    Args:
        channels: width of the tokens.
        heads: attention heads.
        reduction: as of ``MixTransformer``.
        drop_path: probability of leaving out a branch of an image, in training.
    """

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm_1 = nn.LayerNorm(channels)
        output = nn.ModuleDict({"dense": nn.Linear(channels, channels)})
        self.attention = nn.ModuleDict({"self": _Attention(channels, heads, reduction), "output": output})
        self.layer_norm_2 = nn.LayerNorm(channels)
        self.mlp = _MixFFN(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, h, w, C) -> (N, h, w, C)."""
        y = self.attention["output"]["dense"](self.attention["self"](self.layer_norm_1(tokens)))
        tokens = tokens + self._dropped(y)
        return tokens + self._dropped(self.mlp(self.layer_norm_2(tokens)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al., arXiv:1603.09382), by image."""
        if not self.training or not self.drop_path:
            return branch
        kept = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop_path)
        return branch * (kept / (1 - self.drop_path))
