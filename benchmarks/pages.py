"""The pages that show tables and the tables that there are.

A page shows a table between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one of TABLES.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from timm_deconv.errors import unknown_name

from .accuracy_tables import (
    FORMS,
    RECIPE,
    WIDE,
    Maker,
    Named,
    against_the_paper,
    by_rate,
    calibrated_or_not,
    conversions,
    five_epochs,
    going_on,
    in_half_the_steps,
    levers,
    networks_by_form,
    one_epoch_on_a_core,
    photographs,
    readme_accuracy,
    segmentation_from_scratch,
    variants_of,
    windows_in_depthwise,
)
from .cost_tables import (
    blocks,
    evaluation,
    gpu_goals,
    host,
    kernels,
    layers,
    loop_cost,
    memory,
    operations,
    published_steps,
    readme_cost,
    scaling,
    steps,
)
from .export_tables import export_ranges, exports
from .hub_tables import loaded_by_path
from .sharing_tables import equivalence, sent_bytes, sharing_speed
from .survival_tables import killed_runs
from .tables import markdown
from .zoo_tables import zoo

__all__ = ["TABLES", "filled", "stale_pages"]

TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# What was tried, as `study.py` calls it and as the page of experiments does.

EARLIER = " deconv.quartic=false deconv.roles.stem.n_iter=15"
"""What `fast` was before its stem took three steps and its steps became one polynomial."""

UP_TO_256 = "".join(
    f" deconv.patterns.stages?{layers}*.{field}=256" for layers in ("1", "2?1") for field in ("block", "wide_block")
)
"""Blocks of 256 in those layers of `vgg11_cifar` that have at most 256 channels and more than 64."""

EARLIER_BLOCKS: Named = {
    f"fast{EARLIER} deconv.block=64{UP_TO_256}": "blocks of 256 in layers of up to 256 channels, else 64",
    f"fast{EARLIER} deconv.block=64 deconv.max_rows=2048{UP_TO_256}": "the same, at most 2,048 rows",
    f"fast{EARLIER} deconv.block=64 deconv.max_rows=1024{UP_TO_256}": "the same, at most 1,024 rows",
    f"fast{EARLIER} deconv.block=64 deconv.n_iter=2{UP_TO_256}": "the same, 2 steps",
    f"fast{EARLIER} deconv.wide_block=256": "blocks of 256 everywhere",
    f"fast{EARLIER} deconv.wide_block=256 deconv.roles.spatial.max_rows=1024": "256 everywhere, at most 1,024 rows",
    f"fast{EARLIER} deconv.block=128 deconv.wide_block=128": "blocks of 128 everywhere",
    f"fast{EARLIER} deconv.block=64": "blocks of 64 everywhere",
    f"fast{EARLIER} deconv.block=64 deconv.n_iter=4": "blocks of 64, 4 steps",
    f"fast{EARLIER} deconv.block=64 deconv.roles.spatial.max_rows=16384": "blocks of 64, at most 16,384 rows",
    f"fast{EARLIER} deconv.block=64 deconv.roles.classifier.block=256": "blocks of 64, classifier in blocks of 256",
    f"fast{EARLIER} deconv.block=64 deconv.roles.classifier.n_iter=5": "blocks of 64, classifier in 5 steps",
    f"fast{EARLIER} deconv.roles.spatial.layout=window deconv.roles.spatial.block=16": "windows of 16 channels",
}

STEMS: Named = {
    "fast": "`fast`",
    "fast deconv.roles.stem.n_iter=2": "stem in 2 steps",
    "fast deconv.roles.stem.n_iter=6": "stem in 6 steps",
    "fast deconv.roles.stem.n_iter=15": "stem in 15 steps, as published for some families",
    "fast deconv.block=128": "at most 128 channels together",
    "fast deconv.block=64": "at most 64 channels together",
    "fast deconv.max_rows=2048 deconv.roles.stem.n_iter=15": "stem in 15 steps, at most 2,048 rows",
}

POLYNOMIALS: Named = {
    "fast deconv.roles.stem.n_iter=15": "three steps as the nearest quartic",
    f"fast{EARLIER}": "three steps one by one",
    "fast deconv.roles.stem.n_iter=15 by the nearest quadratic": "three steps as the nearest quadratic",
}

ONE_STEP: Named = {
    "fast": "`fast`",
    "fast deconv.patterns.stages?*?1?conv.n_iter=1": "one step in the odd layers",
    "fast deconv.patterns.stages?*?2?conv.n_iter=1": "one step in the even layers",
}

BEFORE = f"fast{EARLIER} deconv.block=64"
CHEAPER_STEPS: Named = {
    "fast": "`fast`",
    "fast deconv.block=128 deconv.roles.classifier.block=512": "blocks of 128",
    "fast deconv.block=64 deconv.roles.classifier.block=512": "blocks of 64",
    "fast live_every=2": "every second step, running ones between",
    "fast live_every=2 between=last": "every second step, those of before between",
}

PADDING: Named = {
    f"{BEFORE} before padding was weighed": "no padding counted",
    BEFORE: "at most a hundredth of it, as now",
    f"{BEFORE} with MOST_PADDING = 1": "all of it",
    f"{BEFORE} with all padding in the covariance alone": "all of it, in the covariance alone",
    f"{BEFORE} deconv.max_positions=8192": "none, twice the sampled positions",
}

CHEAPER: Named = {
    "fast": "`fast`",
    "fast deconv.roles.block_end.block=64": "blocks of 64 at residual ends",
    "fast deconv.roles.block_end.max_rows=1024": "at most 1,024 rows at residual ends",
    "fast deconv.block=128": "at most 128 channels together",
    "fast deconv.max_rows=2048": "at most 2,048 rows",
    "fast deconv.wide_block=32": "wide layers in blocks of 32",
    "fast deconv.roles.pointwise.n_iter=1": "one step in the shortcuts",
    "fast deconv.roles.block_end.block=1 deconv.roles.block_end.per_block=true": (
        "channels standardised at residual ends"
    ),
    "fast deconv.roles.pointwise.block=1 deconv.roles.pointwise.per_block=true": "channels standardised in shortcuts",
}

DEPTHWISE: Named = {
    "fast": "`fast`: each channel, 4,096 pixels 2 apart",
    "fast deconv.max_rows=8192": "8,192 rows in all layers",
    f"fast{windows_in_depthwise(4096, block=1)}": "each channel, 4,096 pixels 3 apart",
    f"fast{windows_in_depthwise(2048, block=1)}": "each channel, 2,048 pixels 3 apart",
    f"fast{windows_in_depthwise(256, block=1)}": "each channel, 256 pixels 3 apart",
    f"fast{windows_in_depthwise(256)}": "whole windows, 256 of them",
    f"fast{windows_in_depthwise(256)} deconv.roles.pointwise.n_iter=2": "whole windows, 2 steps in pointwise layers",
}

GROUPED: Named = {
    "fast": "`fast`: whole windows, 1,024 of them",
    "fast deconv.roles.grouped.block=1": "each channel, 1,024 pixels",
    "fast deconv.roles.grouped.block=1 deconv.roles.grouped.max_rows=4096": "each channel, 4,096 pixels",
}

STEPS: Named = {
    "fast": "`fast`: each channel in depthwise layers",
    f"fast{windows_in_depthwise(256)}": "windows in depthwise layers",
    f"fast{windows_in_depthwise(256)} deconv.roles.block_end.n_iter=3": "and three steps at residual ends",
    f"fast{windows_in_depthwise(256)} deconv.roles.block_end.n_iter=3 deconv.roles.depthwise.n_iter=3": (
        "and in depthwise layers"
    ),
}

WINDOWS: Named = {"fast": "`fast`", f"fast{windows_in_depthwise(256)}": "windows in depthwise layers"}

EXCITES: Named = {
    "fast": "`fast`: squeeze-excite layers plain",
    "fast deconv.roles.squeeze_excite.block=64": "whitened",
    f"fast{windows_in_depthwise(256)}": "windows in depthwise layers, squeeze-excite layers plain",
    f"fast{windows_in_depthwise(256)} deconv.roles.squeeze_excite.block=64": "windows, whitened",
    f"fast{windows_in_depthwise(2048, block=1)} deconv.roles.squeeze_excite=null": "2,048 pixels 3 apart, plain",
    f"fast{windows_in_depthwise(2048, block=1)} deconv.roles.squeeze_excite.block=64": "2,048 pixels 3 apart, whitened",
}

BLOCK_ENDS: Named = {
    "twin": "batch norm",
    "paper": "`paper`",
    "fast": "`fast`",
    "fast deconv.roles.block_end.n_iter=3": "three steps at residual ends",
    "fast deconv.roles.pointwise.n_iter=1": "one step in pointwise layers",
    "fast deconv.roles.pointwise.n_iter=2": "two in pointwise layers",
}

MUON: Named = {
    "twin opt=muon lr=0.02": "batch norm, Muon at 0.02",
    "twin opt=muon lr=0.1": "batch norm, Muon at 0.1",
    f"fast{EARLIER} opt=muon lr=0.02": "an earlier `fast`, Muon at 0.02",
    f"fast{EARLIER} opt=muon lr=0.005": "an earlier `fast`, Muon at 0.005",
}

CLIPPED: Named = {
    WIDE: "no clipping, blocks of 256",
    f"{WIDE} clip_grad=5": "norm of the gradient at most 5",
    f"{WIDE} clip_grad=1": "norm of the gradient at most 1",
    RECIPE: "the recipe: steps bounded, blocks of 64",
}

ON_CAMVID: Named = {
    WIDE: "blocks of 256, no bound",
    f"{WIDE} layer_rates=false": "one learning rate for all layers",
    f"{WIDE} momentum=0.8": "momentum 0.8",
    f"{WIDE} deconv.roles.pointwise.n_iter=2": "two steps in pointwise layers",
    RECIPE: "the recipe: steps bounded, blocks of 64",
}

HALF = {"width": "0.5", "amp": "bfloat16", "device": "cpu"}
FULL_ON_A_CORE = {"width": "1.0", "amp": "bfloat16", "device": "cpu"}
FULL = {"width": "1.0", "amp": "", "device": "cuda"}
TEN_THOUSAND = "densenet121_cifar resnet18_cifar resnet50_cifar resnext29_32x4d_cifar mobilenetv2_cifar".split()
TEN_THOUSAND += "efficientnet_b0_cifar senet18_cifar pnasnet_a_cifar".split()

TABLES: dict[str, Maker] = {
    "README: accuracy": readme_accuracy,
    "README: cost": readme_cost,
    "zoo": zoo,
    "killed runs": killed_runs,
    "published networks": loaded_by_path,
    "equivalence": equivalence,
    "sent bytes": sent_bytes,
    "sharing speed": sharing_speed,
    "loop": loop_cost,
    "one epoch, full width": networks_by_form(
        ["resnet18_cifar", "mobilenetv2_cifar", "senet18_cifar", "efficientnet_b0_cifar", "pnasnet_a_cifar"],
        FORMS,
        epochs="1",
        **FULL,
    ),
    "one epoch on a core": one_epoch_on_a_core,
    "one epoch beside the paper": against_the_paper,
    "segmentation from scratch": segmentation_from_scratch,
    "one epoch, half width": networks_by_form(
        ["vgg11_cifar", "resnet18_cifar", "mobilenetv2_cifar"], FORMS, epochs="1", **HALF
    ),
    "10,000 images": networks_by_form(TEN_THOUSAND, FORMS, suffix=" train_images=10000", epochs="1", **HALF),
    "three epochs": networks_by_form(
        ["mobilenetv2_cifar"],
        {
            "twin": "batch norm",
            f"fast{windows_in_depthwise(2048, block=1)}": "each channel in depthwise layers",
            f"fast{windows_in_depthwise(256)}": "windows in depthwise layers",
        },
        epochs="3",
        **FULL,
    ),
    "five epochs": five_epochs,
    "levers": levers,
    "fine-tuning, CIFAR-10": by_rate("mobilenetv2_100", "jpeg75"),
    "fine-tuning, Fashion-MNIST": by_rate("mobilenetv2_100", "fashion_mnist"),
    "fine-tuning, CamVid": by_rate("mobilenetv2_100", "camvid"),
    "fine-tuning, Lite0, CIFAR-10": by_rate("tf_efficientnet_lite0", "jpeg75"),
    "fine-tuning, Lite0, Fashion-MNIST": by_rate("tf_efficientnet_lite0", "fashion_mnist"),
    "fine-tuning in half the steps": in_half_the_steps,
    "calibrated or not": calibrated_or_not,
    "going on": going_on,
    "photographs": photographs,
    "conversions": conversions,
    "exports": exports,
    "export ranges": export_ranges,
    "steps": steps(device="cpu", compile="", amp=""),
    "compiled steps": steps(device="cpu", compile="default", price=False),
    "GPU goals": gpu_goals,
    "GPU steps": steps(device="cuda", price=False),
    "published steps": published_steps,
    "evaluation": evaluation,
    "memory": memory,
    "scaling": scaling,
    "blocks": blocks,
    "kernels": kernels,
    "host": host,
    "layers": layers,
    "operations": operations,
    "tried: blocks": variants_of("vgg11_cifar", EARLIER_BLOCKS, epochs="1", **FULL_ON_A_CORE),
    "tried: cheaper steps": networks_by_form(
        ["vgg11_cifar", "resnet18_cifar"], CHEAPER_STEPS, epochs="5", amp="bfloat16", device="cpu"
    ),
    "tried: stems": variants_of("vgg11_cifar", STEMS, epochs="1", **FULL_ON_A_CORE),
    "tried: polynomials": variants_of("vgg11_cifar", POLYNOMIALS, epochs="1", **HALF),
    "tried: one step": variants_of("vgg11_cifar", ONE_STEP, epochs="1", **HALF),
    "tried: padding": variants_of("vgg11_cifar", PADDING, epochs="1", width="0.5", amp="", device="cpu"),
    "tried: cheaper": variants_of("resnet18_cifar", CHEAPER, epochs="1", **FULL),
    "tried: depthwise": variants_of("mobilenetv2_cifar", DEPTHWISE, epochs="1", **FULL),
    "tried: windows": networks_by_form(["efficientnet_b0_cifar", "pnasnet_a_cifar"], WINDOWS, epochs="1", **FULL),
    "tried: grouped": variants_of("resnext29_32x4d_cifar", GROUPED, epochs="1", **FULL),
    "tried: steps": variants_of("mobilenetv2_cifar", STEPS, epochs="1", **HALF),
    "tried: squeeze-excite": variants_of("efficientnet_b0_cifar", EXCITES, epochs="1", **FULL),
    "tried: block ends": networks_by_form(
        TEN_THOUSAND[:-2], BLOCK_ENDS, suffix=" train_images=10000", epochs="1", **HALF
    ),
    "tried: Muon": variants_of("vgg11_cifar", MUON, epochs="1", **HALF),
    "tried: clipping": by_rate("mobilenetv2_100", "jpeg75", CLIPPED),
    "tried: CamVid": by_rate("mobilenetv2_100", "camvid", ON_CAMVID),
}


def filled(page: str, results: Path) -> str:
    """Return a page's text with the tables that it names made anew from the rows.

    Raises:
        InputError: the page names a table that there is not, with the nearest names, or one without rows.
    """

    def fill(block: re.Match[str]) -> str:
        opening, name, closing = block.groups()
        if name not in TABLES:
            raise unknown_name("table", name, TABLES)
        return f"{opening}{markdown(TABLES[name](results))}\n{closing}"

    return TABLE.sub(fill, page)


def stale_pages(pages: Iterable[Path], results: Path) -> dict[Path, str]:
    """Return the pages whose tables are not those that the rows give, with the text that they should have."""
    fresh = {page: filled(page.read_text(), results) for page in pages}
    return {page: text for page, text in fresh.items() if text != page.read_text()}
