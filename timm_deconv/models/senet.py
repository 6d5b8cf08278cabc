"""SENet for 32x32 images: pre-activation blocks with squeeze-excite modules, norm and ReLU behind the stem.

Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020.
"""

from .preact_resnet import CifarPreActResNet
from .registration import CIFAR_POLICY, IMAGENET_POLICY, cifar_cfg, frozen_stem, register_deconv, register_family

register_family(
    __name__,
    CifarPreActResNet,
    {"senet18_cifar": {"layers": (2, 2, 2, 2), "norm_stem": True, "se_reduction": 16}},
    frozen_stem(CIFAR_POLICY, 15),
    cfg=cifar_cfg(first_conv="stem.conv", paper_ids="arXiv:1709.01507"),
    in_place=True,
)

register_deconv(
    __name__,
    ("seresnet50", "legacy_seresnet18", "legacy_seresnet50", "legacy_senet154"),
    frozen_stem(IMAGENET_POLICY, 15),
    in_place=True,
)
