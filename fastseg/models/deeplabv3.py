"""DeepLabV3: atrous spatial pyramid pooling on a dilated ResNet."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastseg.models.base import AuxiliaryNet
from fastseg.models.encoders import ENCODERS
from fastseg.models.encoders.resnet import DilationStyle
from fastseg.models.fcn_head import fcn_head
from fastseg.nn.aspp import ASPP
from fastseg.nn.fuse.sequential import Sequential

BACKBONES = ("resnet50", "resnet101", "resnet18", "resnet34")
RATES = (12, 24, 36)  # at output stride 8; half of that at 16
CHANNELS = 256


class DeepLabV3(AuxiliaryNet):
    """DeepLabV3 (Chen et al., arXiv:1706.05587), with torchvision's names, which resizes with ``align_corners=False``.

    The weights of ``torchvision.models.segmentation.deeplabv3_resnet50`` and ``_resnet101`` load unchanged, with
    ``aux=True`` those of the auxiliary head too; without it ``load_weights`` warns that they are left out. ResNet-18
    and 34 dilate their basic blocks, which torchvision refuses. ``dilation_style="smp", align_corners=True`` is the net
    of segmentation_models_pytorch, whose files ``load_weights`` then reads.

    Args:
        num_classes: classes, background included.
        backbone: "resnet18", "resnet34", "resnet50" or "resnet101".
        output_stride: input size / size of the deepest features: 8 or 16.
        aux: True for a second head on ``layer3``; in training ``forward`` then returns a list of two, and ``loss`` adds
            half of the second head's loss.
        width: multiplier of the backbone's widths.
        in_channels: channels of the image.
        channels: width of the ASPP and the head.
        dilation_style: of the encoder: "torchvision" or "smp", see ``fastseg.models.encoders.ResNet``.
        align_corners: of the interpolation to the image's size.
        rates: dilations of the ASPP, in pixels; None means 12, 24 and 36 at output stride 8, half of that at 16. (In
            segmentation_models_pytorch they do not depend on the output stride.)

    Raises:
        ValueError: the value of an option is out of range.

    Training needs a batch of two or more: batch norm follows the image pooling, which leaves one pixel per image.

    Example:
        >>> model = DeepLabV3(num_classes=21).eval()
        >>> model(torch.randn(1, 3, 65, 47)).shape
        torch.Size([1, 21, 65, 47])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        output_stride: int = 8,
        *,
        aux: bool = False,
        width: float = 1.0,
        in_channels: int = 3,
        channels: int = CHANNELS,
        dilation_style: DilationStyle = "torchvision",
        align_corners: bool = False,
        rates: Sequence[int] | None = None,
    ):
        super().__init__(num_classes, align_corners=align_corners)
        if backbone not in BACKBONES:
            raise ValueError(f"DeepLabV3: no backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
        if output_stride not in (8, 16):
            raise ValueError(f"DeepLabV3: output_stride is {output_stride}; use 8 or 16")
        if channels < 1:
            raise ValueError(f"DeepLabV3: channels is {channels}; use a positive number")
        self.dilation_style = dilation_style
        self.backbone = ENCODERS[backbone](in_channels, output_stride, width, dilation_style=dilation_style)
        middle, deep = self.backbone.out_channels[-2:]
        self.classifier = Sequential(
            ASPP(deep, channels, rates or [rate * 8 // output_stride for rate in RATES], dropout=0.5),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.aux_classifier = fcn_head(middle, num_classes) if aux else None

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits at the output stride."""
        return self.classifier(self.backbone(x)[-1])

    @property
    def auxiliary(self) -> nn.Module | None:
        return self.aux_classifier

    def both(self, x: Tensor) -> list[Tensor]:
        *_, middle, deep = self.backbone(x)
        return [self.classifier(deep), self.aux_classifier(middle)]
