"""EfficientNet-B0 for 32x32 images: MobileNetV2's blocks with squeeze-excite on their output.

Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, in the 32x32 form of
Table 1 of Ye et al., Network Deconvolution, ICLR 2020: 3x3 depthwise convolutions only, ReLU, no convolution behind the
last block.
"""

from timm_deconv.models._twins import STAGED_FEATURES, register_twins
from timm_deconv.models.mobilenetv2 import CifarMobileNetV2

register_twins(
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
    feature_cfg={**STAGED_FEATURES, "out_indices": (0, 1, 2, 3, 4, 5)},
    first_conv="stem.conv",
    pool_size=(1, 1),
    paper_ids="arXiv:1905.11946",
)
