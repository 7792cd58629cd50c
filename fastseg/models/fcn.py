"""FCN: class scores of several encoder stages, upsampled by bilinear kernels and summed."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.models import bilinear_score
from fastseg.models.encoders import ENCODERS, VGG16
from fastseg.models.encoders.vgg import as_linear
from fastseg.models.encoders.widths import scaled
from fastseg.models.fcn_head import fcn_head
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.sequential import Sequential, run_layers
from fastseg.nn.leaf import leaf
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import BilinearConvTranspose2d, UpsampleArgmax

# The strides of the finest scores that each backbone has.
STRIDES = {"vgg16": (32, 16, 8), **{f"resnet{depth}": (32, 16, 8, 4) for depth in (18, 34, 50, 101)}}
VGG16_LAYERS = tuple([f"conv{i}_{k + 1}" for k in range(n)] for i, n in enumerate((2, 2, 3, 3, 3), 1))
AUX_WEIGHT = 0.5  # of the auxiliary loss

Backbone = Literal["vgg16", "resnet18", "resnet34", "resnet50", "resnet101"]


class FCN(nn.Module):
    """Fully convolutional network (Long, Shelhamer and Darrell, arXiv:1411.4038), in four forms.

    - ``backbone="vgg16"``: the reference's FCN-32s, 16s and 8s (https://github.com/shelhamer/fcn.berkeleyvision.org)
      with its padding of 100, pools that round up, and crops. Names are those of
      https://github.com/wkentaro/pytorch-fcn.
    - a ResNet, stride 16, 8 or 4: a head (3x3 convolution, batch norm, leaky ReLU, dropout, 1x1) on each stage from
      that stride on. One kernel, ``up_score2``, serves all steps between the stages. At stride 4 it is the FCN-4s of
      the article. ``load_weights`` reads files of its code, with the kernels that it has and never uses.
    - a ResNet, stride 32: the FCN-32s of https://d2l.ai, one 1x1 convolution and one transposed convolution with a
      bias, and its names; there the kernel is learnt (``trainable_upsampling=True``).
    - ``preset="torchvision"``, a ResNet: ``torchvision.models.segmentation.fcn_resnet50`` and ``_resnet101``, and their
      names. The encoder is dilated to stride 8, one head (3x3 convolution, batch norm, ReLU, dropout, 1x1) stands on
      its last stage, and a bilinear interpolation brings the scores to the image's size. With ``aux=True`` there is a
      head on ``layer3`` too.

    Images of any size work. ResNet maps are aligned at the top left: if 32 does not divide a side, upsampled
    scores are cropped at the bottom and right to the size of the next stage, and finally to that of the image.

    Args:
        num_classes: classes, background included.
        backbone: "vgg16", "resnet18", "resnet34", "resnet50" or "resnet101"; None means "vgg16", or "resnet50" with
            ``preset="torchvision"``.
        stride: of the finest scores, in pixels: 32, 16 or 8, with a ResNet also 4; 8 with ``preset="torchvision"``.
        aux: True to train the scores of the deepest stage (torchvision: of ``layer3``) as well. In training ``forward``
            then returns a list, the logits and those of FCN-32s (torchvision: of the second head), and ``loss`` adds
            0.5 times the latter's loss. Not for stride 32.
        trainable_upsampling: True to learn the kernels of all transposed convolutions, bilinear at first, from every
            class to every class. Fixed kernels, as in the reference, need no memory and run through the fused heads.
        width: multiplier of the encoder's widths, and of VGG16's fc6 and fc7.
        in_channels: channels of the image.
        at_once: True to scale pool4 and pool3 before they are scored, as the reference does to train FCN-8s in one
            stage; for "vgg16" at stride 8.
        preset: None or "torchvision".
        as_dict: True if ``forward`` returns, in training and in evaluation, a dictionary as torchvision's and the
            article's do: "out" holds the logits and, with ``aux``, "aux" the auxiliary ones.

    Score layers are initialised at random, not to zero as in the reference; its paper found no difference.

    Raises:
        ValueError: the value of an option is out of range.

    Example:
        >>> model = FCN(num_classes=21, backbone="resnet50", stride=4).eval()
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 21, 64, 96])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone | None = None,
        stride: int = 8,
        aux: bool = False,
        trainable_upsampling: bool = False,
        *,
        width: float = 1.0,
        in_channels: int = 3,
        at_once: bool = False,
        preset: Literal["torchvision"] | None = None,
        as_dict: bool = False,
    ):
        super().__init__()
        if preset not in (None, "torchvision"):
            raise ValueError(f'FCN: no preset {preset!r}; use "torchvision" or None')
        if backbone is None:
            backbone = "vgg16" if preset is None else "resnet50"
        if backbone not in STRIDES:
            raise ValueError(f"FCN: no backbone {backbone!r}; use one of {', '.join(STRIDES)}")
        if stride not in STRIDES[backbone]:
            strides = ", ".join(map(str, STRIDES[backbone]))
            raise ValueError(f"FCN: stride is {stride}; with {backbone} use one of {strides}")
        if num_classes < 1:
            raise ValueError(f"FCN: num_classes is {num_classes}; at least one class is needed")
        if aux and stride == 32:
            raise ValueError("FCN: aux=True at stride 32, where the deepest scores are the only ones; use aux=False")
        if at_once and (backbone, stride) != ("vgg16", 8):
            raise ValueError(f'FCN: at_once=True with {backbone} at stride {stride}; it is for "vgg16" at stride 8')
        if preset is not None and (backbone == "vgg16" or stride != 8 or trainable_upsampling):
            raise ValueError(
                f"FCN: preset is {preset!r}, backbone {backbone!r}, stride {stride}, trainable_upsampling "
                f"{trainable_upsampling}; it has a ResNet at stride 8 and no kernel to learn"
            )
        self.stride, self.aux, self.at_once, self.as_dict = stride, aux, at_once, as_dict
        # Names of transposed convolutions: between stages (with the crop of the skip), and to the image.
        self._steps: tuple[tuple[str, int], ...] = ()
        self._last = self._deepest = ""
        up = partial(BilinearConvTranspose2d, num_classes, trainable=trainable_upsampling)
        if preset is not None:
            self._form = "torchvision"
            self._build_torchvision(num_classes, ENCODERS[backbone](in_channels, 8, width))
        elif backbone == "vgg16":
            self._form = "vgg16"
            self._build_vgg16(
                num_classes, VGG16(in_channels, width=width, ceil_mode=True, first_padding=100), up, width
            )
        else:
            self._form = "d2l" if stride == 32 else "resnet"
            build = self._build_d2l if stride == 32 else self._build_resnet
            build(num_classes, ENCODERS[backbone](in_channels, 32, width), up)

    @leaf
    def forward(self, x: Tensor) -> Tensor | list[Tensor] | dict[str, Tensor]:
        """(N, in_channels, H, W) -> logits (N, num_classes, H, W); with ``aux``, in training, a list of two.

        With ``as_dict`` a dictionary of "out" and, with ``aux``, "aux".
        """
        second = self.aux and (self.training or self.as_dict)
        scores, other = self._scores(x, second)
        logits = [self._full(self._last, scores, x.shape[2:])]
        if second:
            logits.append(self._full(self._deepest, other, x.shape[2:]))
        if self.as_dict:
            return dict(zip(("out", "aux"), logits, strict=False))
        return logits if second else logits[0]

    def logits(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits before the last transposed convolution, one per ``stride`` pixels.

        With VGG16 they also cover the frame of zeros around the image.
        """
        return self._scores(x)[0]

    def predict(self, x: Tensor, *, confidence: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(N, in_channels, H, W) -> class map (N, H, W) of ``forward``; uint8 for up to 256 classes."""
        scores = self._scores(x)[0]
        if self._form == "torchvision":
            return UpsampleArgmax()(scores, x.shape[2:], confidence=confidence)
        return bilinear_score.class_map(getattr(self, self._last), scores, x.shape[2:], confidence=confidence)

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of ``forward(x)`` and the class indices ``target`` (N, H, W).

        ``options`` are those of ``fastseg.nn.UpsampleCrossEntropyLoss``, such as ``ignore_index=255``.

        Raises:
            ValueError: ``target`` has another size than ``x``.
        """
        if target.shape[-2:] != x.shape[-2:]:
            raise ValueError(f"FCN.loss: x is {tuple(x.shape)}, target is {tuple(target.shape)}; give them equal sides")
        second = self.aux and self.training
        scores, other = self._scores(x, second)
        loss = self._cross_entropy(self._last, scores, target, **options)
        return loss + AUX_WEIGHT * self._cross_entropy(self._deepest, other, target, **options) if second else loss

    def _full(self, name: str, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores at the size of the image; ``name`` is that of their transposed convolution."""
        if self._form == "torchvision":
            return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return bilinear_score.upsampled(getattr(self, name), scores, size)

    def _cross_entropy(self, name: str, scores: Tensor, target: Tensor, **options: Any) -> Tensor:
        if self._form == "torchvision":
            return UpsampleCrossEntropyLoss(**options)(scores, target)
        return bilinear_score.cross_entropy(getattr(self, name), scores, target, **options)

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's tensors, uncopied, in torchvision's names and shapes; VGG16's include fc6 and fc7."""
        if self._form in ("resnet", "torchvision"):
            return self.backbone.state_dict()
        state = self.state_dict()
        if self._form == "d2l":
            names = {"0": "conv1", "1": "bn1", **{str(3 + i): f"layer{i}" for i in (1, 2, 3, 4)}}
        else:
            indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
            names = {name: f"features.{i}" for name, i in zip(itertools.chain(*VGG16_LAYERS), indices, strict=True)}
            names |= {"fc6": "classifier.0", "fc7": "classifier.3"}
            state |= {"fc6.weight": as_linear(self.fc6), "fc7.weight": as_linear(self.fc7)}
        parts = {key: key.partition(".") for key in state}
        return {f"{names[name]}.{rest}": state[key] for key, (name, _, rest) in parts.items() if name in names}

    def _scores(self, x: Tensor, second: bool = False) -> tuple[Tensor, Tensor]:
        """The sum of all scores, at ``stride``, and the scores of the auxiliary loss, if there is a ``second``."""
        if self._form == "torchvision":
            *_, middle, deep = self.backbone(x)
            scores = self.classifier(deep)
            return scores, self.aux_classifier(middle) if second else scores
        maps = {"vgg16": self._vgg16_maps, "resnet": self._resnet_maps, "d2l": self._d2l_maps}[self._form]
        deepest, *skips = maps(x)
        scores = deepest
        for (name, offset), skip in zip(self._steps, skips, strict=True):
            # VGG16's skip is larger than the upsampled map, by its padding; a ResNet's may be smaller, by a pixel.
            size = None if self._form == "vgg16" else skip.shape[2:]
            scores = bilinear_score.upsampled(getattr(self, name), scores, size, skip=skip, offset=offset)
        return scores, deepest

    # The forms: their layers, and their score maps from the deepest stage on.

    def _build_vgg16(self, num_classes: int, encoder: VGG16, up: Callable[..., nn.Module], width: float) -> None:
        for names, stage in zip(VGG16_LAYERS, encoder.stages(), strict=True):
            for name, (conv, _) in zip(names, stage, strict=True):
                self.add_module(name, conv)
        *_, pool3, pool4, pool5 = (stage[-1][0].out_channels for stage in encoder.stages())
        hidden = scaled(4096, width, "FCN")
        self.fc6 = nn.Conv2d(pool5, hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.dropout = nn.Dropout(0.5)  # of single elements, as in Caffe; the port drops whole channels
        self.score_fr = nn.Conv2d(hidden, num_classes, 1)
        if self.stride <= 16:
            self.score_pool4 = nn.Conv2d(pool4, num_classes, 1)
            self.upscore2 = up(2, padding=0)
        if self.stride == 8:
            self.score_pool3 = nn.Conv2d(pool3, num_classes, 1)
            self.upscore_pool4 = up(2, padding=0)
        self._steps = (("upscore2", 5), ("upscore_pool4", 9))[: {32: 0, 16: 1, 8: 2}[self.stride]]
        # The reference crops the image out of the last map, which equals that much padding.
        self._last, crop = {32: ("upscore", 19), 16: ("upscore16", 27), 8: ("upscore8", 31)}[self.stride]
        self.add_module(self._last, up(self.stride, padding=crop))
        if self.aux:
            self._deepest = "upscore"
            self.upscore = up(32, padding=19)

    def _vgg16_maps(self, x: Tensor) -> list[Tensor]:
        pools = []
        for names in VGG16_LAYERS:
            for name in names:
                x = run_conv_norm_act(x, getattr(self, name), None, "relu")
            x = F.max_pool2d(x, 2, ceil_mode=True)
            pools.append(x)
        for layer in (self.fc6, self.fc7):
            x = self.dropout(run_conv_norm_act(x, layer, None, "relu"))
        maps = [self.score_fr(x)]
        if self.stride <= 16:
            maps.append(self.score_pool4(pools[3] * 0.01 if self.at_once else pools[3]))
        if self.stride == 8:
            maps.append(self.score_pool3(pools[2] * 0.0001 if self.at_once else pools[2]))
        return maps

    def _build_resnet(self, num_classes: int, encoder: nn.Module, up: Callable[..., nn.Module]) -> None:
        self.backbone = encoder
        strides = [stride for stride in (4, 8, 16, 32) if stride >= self.stride]
        for stride, channels in zip(strides, encoder.out_channels[-len(strides) :], strict=True):
            self.add_module(f"score{stride}", _resnet_head(channels, num_classes))
        self._steps = (("up_score2", 0),) * (len(strides) - 1)
        self._last, self._deepest = f"up_score{self.stride}", "up_score32"
        for stride in sorted({2, self.stride} | ({32} if self.aux else set())):
            self.add_module(f"up_score{stride}", up(stride))

    def _resnet_maps(self, x: Tensor) -> list[Tensor]:
        strides = {5 - i: 32 >> i for i in range(len(self._steps) + 1)}
        features = self.backbone(x)
        return [getattr(self, f"score{stride}")(features[i]) for i, stride in strides.items()]

    def _build_torchvision(self, num_classes: int, encoder: nn.Module) -> None:
        self.backbone = encoder
        middle, deep = encoder.out_channels[-2:]
        self.classifier = fcn_head(deep, num_classes)
        self.aux_classifier = fcn_head(middle, num_classes) if self.aux else None

    def _build_d2l(self, num_classes: int, encoder: nn.Module, up: Callable[..., nn.Module]) -> None:
        for i, layer in enumerate(encoder.children()):
            self.add_module(str(i), layer)
        self.final_conv = nn.Conv2d(encoder.out_channels[-1], num_classes, 1)
        nn.init.xavier_uniform_(self.final_conv.weight)
        self.transpose_conv = up(32, bias=True)
        self._last = "transpose_conv"

    def _d2l_maps(self, x: Tensor) -> list[Tensor]:
        return [self.final_conv(run_layers(x, [getattr(self, str(i)) for i in range(8)]))]


def _resnet_head(in_channels: int, num_classes: int) -> Sequential:
    channels = max(1, in_channels // 4)
    head = Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )
    for layer in (head[0], head[-1]):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="leaky_relu")
    return head
