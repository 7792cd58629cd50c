"""SegFormer: a Mix Transformer and a head of linear layers."""

from torch import Tensor, nn

from fastseg.models.base import SegmentationNet
from fastseg.models.encoders.mit import VARIANTS, MixTransformer
from fastseg.nn.fuse.conv_norm_act import convolve
from fastseg.nn.fuse.resize import run_linear_fuse


class SegFormer(SegmentationNet):
    """SegFormer (Xie et al., arXiv:2105.15203), with the names of Hugging Face's files, which load unchanged.

    ``load_weights(model, folder)`` reads a folder made by ``SegformerForSemanticSegmentation.save_pretrained``. The
    head projects the maps of the four stages to one width, resizes them to stride 4, concatenates and fuses them by a
    1x1 convolution. Linear layer and convolution are one matrix, applied at each map's own size.

    Args:
        num_classes: classes, background included.
        backbone: "mit_b0" to "mit_b5".
        decoder_channels: width of the head; None means 256 for B0 and B1, 768 for the others.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        dropout: probability, before the classifier.
        encoder_options: further keywords of ``fastseg.models.encoders.MixTransformer``, such as ``drop_path``.

    Raises:
        ValueError: the value of an option is out of range; in ``forward``, the image is smaller than 32 pixels.

    Example:
        >>> model = SegFormer(num_classes=19).eval()
        >>> model(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 19, 65, 47])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "mit_b0",
        *,
        decoder_channels: int | None = None,
        width: float = 1.0,
        in_channels: int = 3,
        dropout: float = 0.1,
        encoder_options: dict | None = None,
    ):
        super().__init__(num_classes, align_corners=False)
        if backbone not in VARIANTS:
            raise ValueError(f"SegFormer: no backbone {backbone!r}; use one of {', '.join(VARIANTS)}")
        channels = (256 if backbone in ("mit_b0", "mit_b1") else 768) if decoder_channels is None else decoder_channels
        if channels < 1:
            raise ValueError(f"SegFormer: decoder_channels is {channels}; use a positive number")
        encoder = MixTransformer(backbone, in_channels, width, **(encoder_options or {}))
        self.segformer = nn.ModuleDict({"encoder": encoder})
        self.decode_head = SegFormerHead(encoder.out_channels, channels, num_classes, dropout)

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at stride 4, (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        return self.decode_head(self.segformer["encoder"](x))


class SegFormerHead(nn.Module):
    """The all-MLP head: maps at strides 4 to 32 -> logits at stride 4.

    Args:
        in_channels: widths of the maps.
        channels: width of the projections.
        num_classes: classes.
        dropout: probability, before the classifier.
    """

    def __init__(self, in_channels: list[int], channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        projections = (nn.ModuleDict({"proj": nn.Linear(width, channels)}) for width in in_channels)
        self.linear_c = nn.ModuleList(projections)
        self.linear_fuse = nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """(N, C_i, h_i, w_i) each, the first the largest -> (N, num_classes, h_0, w_0)."""
        maps, linears = features[::-1], [projection["proj"] for projection in self.linear_c][::-1]
        size = features[0].shape[2:]
        y = run_linear_fuse(maps, linears, size, self.linear_fuse, self.batch_norm, self.activation)
        return convolve(self.classifier, self.dropout(y))
