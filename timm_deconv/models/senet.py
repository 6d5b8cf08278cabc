"""SENet for 32x32 images: pre-activation blocks with squeeze-excite modules, norm and ReLU behind the stem.

Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, as in Table 1 of Ye et al., Network Deconvolution, ICLR 2020.
"""

from timm_deconv.models._twins import register_twins
from timm_deconv.models.preact_resnet import CifarPreActResNet

register_twins(
    __name__,
    CifarPreActResNet,
    {"senet18_cifar": {"layers": (2, 2, 2, 2), "norm_stem": True, "se_reduction": 16}},
    first_conv="stem.conv",
    paper_ids="arXiv:1709.01507",
)
