"""Tables of accuracy: training from the beginning, fine-tuning, transfer and conversion.

A variant is what `study.py` calls one: a preset or peer and its settings, in any order.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .tables import Row, Table, last_epochs, mean_and_deviation, numbers, read_rows, select, significant

__all__ = [
    "FINETUNED",
    "FORMS",
    "LEVERS",
    "RATES",
    "RECIPE",
    "UNBOUNDED",
    "WIDE",
    "Maker",
    "Named",
    "against_the_paper",
    "by_rate",
    "calibrated_or_not",
    "conversions",
    "final_rows",
    "five_epochs",
    "going_on",
    "in_half_the_steps",
    "levers",
    "networks_by_form",
    "one_epoch_on_a_core",
    "photographs",
    "readme_accuracy",
    "segmentation_from_scratch",
    "settings",
    "variants_of",
    "windows_in_depthwise",
]

Maker = Callable[[Path], Table]
Named = Mapping[str, str]
"""A variant -> what a table calls it."""

STUDY = "python scripts/study.py {recipe} NETWORK --data-dir DIR --variants ... --seeds ..."
FORMS: Named = {"twin": "batch norm", "paper": "`paper`", "fast": "`fast`"}
RATES = ("0.001", "0.003", "0.01", "0.03", "0.1")


LEVERS: Named = {
    **FORMS,
    "fast deconv.max_rows=1024": "`fast`, at most 1,024 rows",
    "fast deconv.block=64": "`fast`, blocks of 64 channels",
    "fast deconv.block=16": "`fast`, blocks of 16 channels",
    "fast deconv.roles.classifier.block=64": "`fast`, classifier in blocks of 64",
    "fast deconv.sampling_stride=4": "`fast`, pixels 4 apart",
    "fast deconv.n_iter=2": "`fast`, 2 steps",
    "fast deconv.n_iter=5": "`fast`, 5 steps",
    "fast deconv.layout=window deconv.block=16": "`fast`, windows of 16 channels",
    "iterative": "iterative normalisation (Huang et al., 2019)",
}
"""The options of whitening whose accuracy is known at the time of a step."""


def settings(variant: str) -> str:
    """Return a variant in one order of its settings, without rate and epochs, for which rows have columns."""
    first, *rest = variant.split()
    return " ".join([first, *sorted(word for word in rest if not word.startswith(("lr=", "epochs=")))])


def windows_in_depthwise(rows: int, block: int = 64) -> str:
    """Return the settings under which depthwise layers sample windows 3 apart; a block of 1 standardises channels."""
    options = {"block": block, "max_rows": rows, "sampling_stride": 3}
    return "".join(f" deconv.roles.depthwise.{name}={value}" for name, value in options.items())


# The recipe `finetune`, whose own options are given explicitly in the rows of its study.
WIDE = "fast" + windows_in_depthwise(512)
UNBOUNDED = f"{WIDE} deconv.block=64"
RECIPE = f"{UNBOUNDED} clip_mode=agc clip_grad=0.03"
FINETUNED: Named = {
    "twin": "batch norm",
    "twin clip_mode=agc clip_grad=0.03": "batch norm, steps bounded too",
    "twin freeze_bn=true": "batch norm, frozen",
    RECIPE: "`fast`, the recipe",
    UNBOUNDED: "without the bound on steps",
    WIDE: "without the bound, blocks of 256",
    f"{UNBOUNDED} clip_mode=agc clip_grad=0.1 layer_rates=false": "one learning rate for all layers, bound 0.1",
    f"fast deconv.block=64{windows_in_depthwise(4096, block=1)} clip_mode=agc clip_grad=0.03": (
        "depthwise layers standardise channels"
    ),
    "paper": "`paper`, blocks as published",
}


def final_rows(file: Path) -> list[Row]:
    """Read the last epochs' rows of a study, variants in one order of their settings."""
    return [{**row, "variant": settings(row["variant"])} for row in last_epochs(read_rows(file))]


def _titles(variants: Named) -> dict[str, str]:
    return {settings(variant): title for variant, title in variants.items()}


def _figure(row: Row) -> float:
    return float(row["top1"] or row["miou"])


def _accuracy(rows: Iterable[Row]) -> str:
    return mean_and_deviation([_figure(row) for row in rows])


def networks_by_form(networks: Sequence[str], variants: Named, *, suffix: str = "", **wanted: str) -> Maker:
    """Make a table of accuracy after the last epoch: a line a network, a column a variant.

    Args:
        networks: of `study.csv`.
        variants: without what `suffix` adds, and the titles of their columns.
        suffix: settings that all variants have.
        wanted: texts of other columns: width, epochs, amp, device.
    """
    titles = _titles({variant + suffix: title for variant, title in variants.items()})

    def make(results: Path) -> Table:
        rows = final_rows(results / "study.csv")
        rows = select(rows, network=tuple(networks), variant=tuple(titles), **wanted)
        body = []
        for network in networks:
            own = select(rows, network=network)
            body.append([f"`{network}`", *(_accuracy(select(own, variant=variant)) for variant in titles)])
        head = ["accuracy in %", *titles.values()]
        return Table(head, body, rows, "study.csv", STUDY.format(recipe="cifar10_e1"))

    return make


def variants_of(network: str, variants: Named, **wanted: str) -> Maker:
    """Make a table of accuracy and training loss after the last epoch of one network: a line a variant."""
    titles = _titles(variants)

    def make(results: Path) -> Table:
        rows = final_rows(results / "study.csv")
        rows = select(rows, network=network, variant=tuple(titles), **wanted)
        body = []
        for variant, title in titles.items():
            own = select(rows, variant=variant)
            body.append([title, _accuracy(own), mean_and_deviation(numbers(own, "train_loss"), 3)])
        head = [f"`{network}`", "accuracy in %", "training loss"]
        return Table(head, body, rows, "study.csv", STUDY.format(recipe="cifar10_e1"))

    return make


def five_epochs(results: Path) -> Table:
    """Make the table of VGG-11 for five epochs, with SGD and with Muon, at full width and at half."""
    titles = {**FORMS, "twin opt=muon": "batch norm, Muon", "fast opt=muon": "`fast`, Muon"}
    rows = select(final_rows(results / "study.csv"), network="vgg11_cifar", epochs="5", variant=tuple(titles))
    body = []
    for width, title in (("1.0", "full width, float32, H200"), ("0.5", "half width, bfloat16, CPU")):
        own = select(rows, width=width)
        body.append([title, *(_accuracy(select(own, variant=variant)) for variant in titles)])
    command = STUDY.format(recipe="cifar10_e1").replace("DIR", "DIR epochs=5")
    return Table(["accuracy in %", *titles.values()], body, rows, "study.csv", command)


def one_epoch_on_a_core(results: Path) -> Table:
    """Make the table of VGG-11 at full width for one epoch in float32 on a core, with the seconds that it took."""
    rows = select(final_rows(results / "study.csv"), network="vgg11_cifar", width="1.0", epochs="1", amp="")
    rows = select(rows, device="cpu", variant=tuple(FORMS))
    body = []
    for variant, title in FORMS.items():
        own = select(rows, variant=variant)
        body.append([title, _accuracy(own), mean_and_deviation(numbers(own, "seconds"), 0)])
    head = ["`vgg11_cifar`", "accuracy in %", "seconds of the epoch"]
    return Table(head, body, rows, "study.csv", STUDY.format(recipe="cifar10_e1"))


def against_the_paper(results: Path) -> Table:
    """Make the table of ResNet-18 for one epoch beside the published accuracy (the paper's table 1)."""
    rows = select(read_rows(results / "cifar10.csv"), recipe="cifar10_e1")
    published = {"resnet18_cifar": "56.25", "resnet18_cifar_deconv": "72.89"}
    body = [[f"`{row['model']}`", row["top1"], published[row["model"]]] for row in reversed(rows)]
    command = "accelerate launch scripts/train.py cifar10_e1 --model NAME --data-dir DIR --record"
    return Table(["", "accuracy in %", "in the paper, original images"], body, rows, "cifar10.csv", command)


def segmentation_from_scratch(results: Path) -> Table:
    """Make the table of the recipe `camvid` for an encoder with batch norm and whitened: all seeds."""
    rows = select(read_rows(results / "camvid.csv"), epochs="10")
    body = [
        [f"`{model}`", *(mean_and_deviation(numbers(own, column)) for column in ("miou", "best_miou"))]
        for model in dict.fromkeys(row["model"] for row in rows)
        if (own := select(rows, model=model))
    ]
    command = "python scripts/train.py camvid --model NAME --data-dir DIR --record input_size=[3,180,240] epochs=10 ..."
    return Table(["mean IoU in %", "last epoch", "best epoch"], body, rows, "camvid.csv", command)


def levers(results: Path) -> Table:
    """Make the table of accuracy against the time of a step, VGG-11 at half width: the latest row of each variant."""
    titles = _titles(LEVERS)
    latest = {settings(row["variant"]): row for row in read_rows(results / "study_pareto.csv")}
    ordered = sorted(titles, key=lambda variant: -float(latest[variant]["top1"]))
    body = []
    for variant in ordered:
        row = latest[variant]
        figures = f"{float(row['top1']):.1f}", row["seeds"], significant(1e3 * float(row["seconds"]))
        body.append([titles[variant], *figures])
    head = ["", "accuracy in %", "seeds", "ms a training step"]
    command = "python scripts/study.py cifar10_e1 vgg11_cifar --width 0.5 --picture FILE --variants ..."
    return Table(head, body, [latest[variant] for variant in ordered], "study_pareto.csv", command)


def readme_accuracy(results: Path) -> Table:
    """Make the README's table of accuracy: one epoch of four networks, five of VGG-11, on a GPU."""
    rows = select(final_rows(results / "study.csv"), width="1.0", device="cuda", amp="", variant=tuple(FORMS))
    body, used = [], []
    networks = ("resnet18_cifar", "mobilenetv2_cifar", "senet18_cifar", "efficientnet_b0_cifar")
    for network, epochs in (*((network, "1") for network in networks), ("vgg11_cifar", "5")):
        own = select(rows, network=network, epochs=epochs)
        body.append([f"`{network}`", epochs, *(_accuracy(select(own, variant=variant)) for variant in FORMS)])
        used += own
    head = ["accuracy in %", "epochs", *FORMS.values()]
    return Table(head, body, used, "study.csv", STUDY.format(recipe="cifar10_e1"))


# Fine-tuning -----------------------------------------------------------------------------------------------------


def by_rate(network: str, data: str, variants: Named = FINETUNED) -> Maker:
    """Make a table of fine-tuning for two epochs: a line a variant, a column a rate.

    The figure is accuracy, of CamVid mean IoU. Rows of before 27 November are of other recipes.
    """
    titles = _titles(variants)

    def make(results: Path) -> Table:
        rows = select(final_rows(results / "finetune.csv"), network=network, data=data, epochs="2")
        rows = [row for row in rows if row["variant"] in titles and _rate(row) in RATES and row["date"] > "2026-11-26"]
        body = []
        for variant, title in titles.items():
            if own := select(rows, variant=variant):
                cells = ([row for row in own if _rate(row) == rate] for rate in RATES)
                body.append([title, *map(_accuracy, cells)])
        figure = "mean IoU" if rows[0]["miou"] else "accuracy"
        head = [f"{figure} in % at learning rate", *RATES]
        return Table(head, body, rows, "finetune.csv", STUDY.format(recipe="finetune"))

    return make


def in_half_the_steps(results: Path) -> Table:
    """Make the table of the recipe's one epoch beside two of batch norm and of the recipe, at the best rate of each."""
    forms = ((RECIPE, "1", "recipe, 1 epoch"), ("twin", "2", "batch norm, 2 epochs"), (RECIPE, "2", "recipe, 2 epochs"))
    rows = [row for row in final_rows(results / "finetune.csv") if row["date"] > "2026-11-26"]
    rows = select(rows, network="mobilenetv2_100")
    body, used = [], []
    for data, name in (("jpeg75", "CIFAR-10"), ("fashion_mnist", "Fashion-MNIST"), ("camvid", "CamVid")):
        line = [name]
        for variant, epochs, _ in forms:
            own = select(rows, data=data, variant=settings(variant), epochs=epochs)
            by_rates = [[row for row in own if _rate(row) == rate] for rate in RATES]
            best = max((cell for cell in by_rates if cell), key=lambda cell: statistics.mean(map(_figure, cell)))
            line.append(f"{_accuracy(best)} at {_rate(best[0])}")
            used += best
        body.append(line)
    head = ["accuracy, of CamVid mean IoU, in %", *(title for *_, title in forms)]
    return Table(head, body, used, "finetune.csv", STUDY.format(recipe="finetune"))


def _rate(row: Row) -> str:
    return f"{float(row['lr']):g}"


def calibrated_or_not(results: Path) -> Table:
    """Make the table of fine-tuning from calibrated whiteners and from the identity, by an earlier recipe."""
    earlier = f"{WIDE} deconv.roles.depthwise.n_iter=3 deconv.roles.block_end.n_iter=3"
    titles = _titles({earlier: "calibrated", f"{earlier} calibration_images=0": "from the identity"})
    rows = final_rows(results / "finetune.csv")
    rows = select(rows, network="mobilenetv2_100", epochs="2", variant=tuple(titles))
    sets = {"jpeg75": ("CIFAR-10", "0.01"), "fashion_mnist": ("Fashion-MNIST", "0.01"), "camvid": ("CamVid", "0.1")}
    body, used = [], []
    for data, (name, rate) in sets.items():
        own = [row for row in select(rows, data=data) if _rate(row) == rate]
        body.append([f"{name}, learning rate {rate}", *(_accuracy(select(own, variant=variant)) for variant in titles)])
        used += own
    head = ["accuracy, of CamVid mean IoU, in %", *titles.values()]
    return Table(head, body, used, "finetune.csv", STUDY.format(recipe="finetune"))


def going_on(results: Path) -> Table:
    """Make the table of a batch-norm network of three epochs that goes on for two, as it is or whitened."""
    rows = [row for row in read_rows(results / "finetune.csv") if row["recipe"] == "cifar10_further"]
    body = []
    for name, title in (("twin", "batch norm"), ("fast", "transferred and calibrated")):
        own = [row for row in rows if row["variant"].startswith(name)]
        body.append([title, *(row["top1"] for row in sorted(own, key=lambda row: int(row["epoch"])))])
    head = ["accuracy in % after further epochs", "0", "1", "2"]
    return Table(head, body, rows, "finetune.csv", STUDY.format(recipe="cifar10_further"))


# Transfer and conversion -----------------------------------------------------------------------------------------


def photographs(results: Path) -> Table:
    """Make the table of EfficientNet-Lite0 on a thousand photographs: the latest row of each form."""
    titles = {"batch_norm": "batch norm", "transferred": "transferred", "calibrated": "calibrated", "fused": "fused"}
    file = "transfer.csv"
    latest = {(row["preset"], row["form"]): row for row in read_rows(results / file) if row["images"] == "1000"}
    used, body = [], []
    for preset in ("", "paper", "fast"):
        for form in [*titles, *(f"{title} training" for title in titles)]:
            if (row := latest.get((preset, form))) is not None:
                kind, _, mode = form.partition(" ")
                name = f"`{preset}`, {titles[kind]}" if preset else titles[kind]
                difference = f"{float(row['largest_difference']):.1e}".replace("0.0e+00", "0")
                cells = [f"{float(row['top1']):.1f}", row["same_class"], difference]
                body.append([name + (", in training mode" if mode else ""), *cells])
                used.append(row)
    head = ["`tf_efficientnet_lite0`", "right in %", "named as by batch norm", "largest difference of logits, relative"]
    return Table(head, body, used, file, "python scripts/benchmark.py transfer PHOTOGRAPHS")


def conversions(results: Path) -> Table:
    """Make the table of what came of converting timm's batch-norm networks, by preset."""
    body, rows = [], []
    for preset, file in (("paper", "convert.csv"), ("fast", "convert_fast.csv")):
        own = read_rows(results / file)
        counts = [len(select(own, outcome=outcome)) for outcome in ("pass", "pass (meta)")]
        body.append([f"`{preset}`", f"{len(own)}", *map(str, counts), str(len(own) - sum(counts))])
        rows += own
    head = ["preset", "networks", "equal outputs", "converted without storage", "outputs that differ"]
    return Table(head, body, rows, "convert.csv, convert_fast.csv", "python scripts/benchmark.py convert")
