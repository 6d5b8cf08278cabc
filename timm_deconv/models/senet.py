"""SENet for 32x32 images: pre-activation blocks with squeeze-excite modules, norm and ReLU behind the stem.

Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020.
"""

from ._registration import CIFAR_POLICY, IMAGENET_POLICY, frozen_stem, register_deconv
from ._twins import STAGED_FEATURES, register_twins
from .preact_resnet import CifarPreActResNet

register_twins(
    __name__,
    CifarPreActResNet,
    {"senet18_cifar": {"layers": (2, 2, 2, 2), "norm_stem": True, "se_reduction": 16}},
    first_conv="stem.conv",
    paper_ids="arXiv:1709.01507",
)

register_deconv(__name__, {"senet18_cifar": frozen_stem(CIFAR_POLICY, 15)}, feature_cfg=STAGED_FEATURES, in_place=True)
register_deconv(
    __name__,
    dict.fromkeys(
        ("seresnet50", "legacy_seresnet18", "legacy_seresnet50", "legacy_senet154"), frozen_stem(IMAGENET_POLICY, 15)
    ),
    in_place=True,
)
