"""EfficientNet: timm's, and B0 for 32x32 images of MobileNetV2's blocks with squeeze-excite on their output.

Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, in the 32x32 form of
Table 1 of Ye et al., Network Deconvolution, ICLR 2020: 3x3 depthwise convolutions only, ReLU, no convolution behind the
last block.
"""

from .mobilenetv2 import INVERTED_FEATURES, CifarMobileNetV2, inverted_residual_policy
from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family

# The published network whitens its stem and classifier only and keeps batch norm in the blocks. Here the blocks are
# whitened too, and as inverted residuals they take MobileNetV2's settings.
register_family(
    __name__,
    CifarMobileNetV2,
    {
        "efficientnet_b0_cifar": {
            "groups": (
                (1, 16, 1, 2),
                (6, 24, 2, 1),
                (6, 40, 2, 2),
                (6, 80, 3, 2),
                (6, 112, 3, 1),
                (6, 192, 4, 2),
                (6, 320, 1, 2),
            ),
            "head_chs": None,
            "se_reduction": 16,
        }
    },
    inverted_residual_policy(frozen_stem(CIFAR_POLICY, 10)),
    cfg=cifar_cfg(first_conv="stem.conv", pool_size=(1, 1), paper_ids="arXiv:1905.11946"),
    feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4, 5)},
    in_place=True,
)

register_deconv(
    __name__,
    (
        "efficientnet_b0",
        "efficientnet_b1",
        "efficientnetv2_rw_s",
        "tf_efficientnet_b0",
        "tf_efficientnet_lite0",
        "tf_efficientnet_lite1",
        "tf_efficientnet_lite2",
        "tf_efficientnetv2_s",
    ),
    inverted_residual_policy(frozen_stem(IMAGENET_POLICY, 10)),
    feature_cfg=INVERTED_FEATURES,
    in_place=True,
)
