"""Fingerprints (``fastseg.converting.rule.fingerprint``) of the methods that each rule was written for.

{rule: {class: {method: fingerprints}}}; classes other than the rule's own are parts that it reads. From
segmentation_models_pytorch 0.6.0, transformers 5.24.0, torchvision 0.29.1, timm 1.0.31, and the repositories
milesial/Pytorch-UNet and bubbliiiing/unet-pytorch, pspnet-pytorch, deeplabv3-plus-pytorch.
``tests/converting/test_known.py`` computes them again from the libraries that are installed.
"""

KNOWN: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "smp_unet_block": {
        "UnetDecoderBlock": {"forward": ("76cf997caee3",)},
    },
    "smp_doubling_block": {
        "DecoderBlock": {"forward": ("580b0eb786f9", "bd76c9ce409c")},
    },
    "smp_gated_block": {
        "MFABBlock": {"forward": ("682b3272b13d",)},
    },
    "smp_aspp": {
        "ASPP": {"forward": ("9f9bc4602228",)},
        "ASPPPooling": {"forward": ("04fa0999bfb8",)},
    },
    "smp_deeplabv3_decoder": {
        "DeepLabV3Decoder": {"forward": ("387323a4498e",)},
    },
    "smp_deeplabv3plus_decoder": {
        "DeepLabV3PlusDecoder": {"forward": ("f56c9eb5f083",)},
    },
    "smp_conv_bn": {
        "ConvBnRelu": {"forward": ("49411861b5dc",)},
    },
    "smp_residual": {
        "ResidualConvBlock": {"forward": ("1c4b73be8658",)},
    },
    "smp_segformer_decoder": {
        "SegformerDecoder": {"forward": ("7d96aa673329",)},
        "MLP": {"forward": ("6e6babe98a5c",)},
    },
    "smp_pyramid": {
        "PSPModule": {"forward": ("fda700bc5f55",)},
    },
    "smp_upernet_decoder": {
        "UPerNetDecoder": {"forward": ("416120c9c0e1",)},
    },
    "smp_psp_decoder": {
        "PSPDecoder": {"forward": ("1d583978d70f",)},
        "PSPModule": {"forward": ("7a6f4f5cebb3",)},
        "PSPBlock": {"forward": ("9e53161779db",)},
    },
    "smp_segmentation_block": {
        "SegmentationBlock": {"forward": ("8f744dcc582a",)},
        "Conv3x3GNReLU": {"forward": ("23696a4b83c1",)},
    },
    "smp_fusion_block": {
        "FusionBlock": {"forward": ("62a070f7e908",)},
    },
    "hf_segformer_head": {
        "SegformerDecodeHead": {"forward": ("c96a6d45ec97",)},
        "SegformerMLP": {"forward": ("ea4855d445fb",)},
    },
    "hf_upernet_head": {
        "UperNetHead": {"forward": ("5bf1ad562c6a",), "psp_forward": ("99f5711d5484",)},
        "UperNetPyramidPoolingModule": {"forward": ("aff2cf3b8736",)},
        "UperNetConvModule": {"forward": ("20291c2edb1f",)},
    },
    "hf_conv_module": {
        "UperNetConvModule": {"forward": ("20291c2edb1f",)},
    },
    "tv_aspp": {
        "ASPP": {"forward": ("08e90d98ab0c",)},
        "ASPPPooling": {"forward": ("04fa0999bfb8",)},
    },
    "tv_basic_block": {
        "BasicBlock": {"forward": ("e469bbb0e395",)},
    },
    "tv_bottleneck": {
        "Bottleneck": {"forward": ("ff89db889084",)},
    },
    "tv_inverted_residual": {
        "InvertedResidual": {"forward": ("aff6a950f1d0",)},
    },
    "timm_conv": {
        "ConvNormAct": {"forward": ("db6ac5abd927",)},
        "BatchNormAct2d": {"forward": ("aab01662c2e6",)},
    },
    "timm_separable": {
        "DepthwiseSeparableConv": {"forward": ("c30157d5e615",)},
        "BatchNormAct2d": {"forward": ("aab01662c2e6",)},
    },
    "timm_inverted_residual": {
        "InvertedResidual": {"forward": ("13224c704521",)},
        "BatchNormAct2d": {"forward": ("aab01662c2e6",)},
    },
    "timm_basic_block": {
        "BasicBlock": {"forward": ("459b888dd004",)},
    },
    "timm_bottleneck": {
        "Bottleneck": {"forward": ("58c1c81d9c8b",)},
    },
    "timm_norm": {
        "BatchNormAct2d": {"forward": ("aab01662c2e6",)},
    },
    "unet_up": {
        "Up": {"forward": ("5ffc05107ed6", "f54089ebd1b9")},
        "DoubleConv": {"forward": ("4d99689f30de",)},
    },
    "unet_up_bubbliiiing": {
        "unetUp": {"forward": ("67f08bb86abe", "eaef49e685fe")},
    },
    "psp_bubbliiiing": {
        "_PSPModule": {"forward": ("a419a32c9342",)},
    },
    "aspp_bubbliiiing": {
        "ASPP": {"forward": ("b699f20948bb",)},
    },
    "deeplab_bubbliiiing": {
        "DeepLab": {"forward": ("9730ea4af2ab",)},
    },
}
