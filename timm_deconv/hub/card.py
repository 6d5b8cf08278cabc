"""The model card: what a published network is, how it is used, how good it is under which conditions, its limits."""

import json
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_deconv.convert import DeconvPolicy
from timm_deconv.layers.notices import share_notices
from timm_deconv.models.weights import TAG_PREFIX

from .measure import Measured
from .origins import LICENSES
from .source import Source

__all__ = ["eval_results", "model_card"]

DATASETS = {
    "cifar10": ("uoft-cs/cifar10", "CIFAR-10"),
    "cifar100": ("uoft-cs/cifar100", "CIFAR-100"),
    "mnist": ("ylecun/mnist", "MNIST"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"),
    "imagenet": ("ILSVRC/imagenet-1k", "ImageNet-1k"),
    "digits": (None, "the 8x8 digits of scikit-learn, enlarged"),
    "camvid": (None, "CamVid"),
    "cityscapes": (None, "Cityscapes"),
}
"""By the word of a run's row: the data set of the Hub, where it is there under a name that does not change, and what
it is called."""

FIGURES = {
    "top1": ("image-classification", "accuracy", "top-1 accuracy"),
    "miou": ("image-segmentation", "mean_iou", "mean IoU"),
}
"""A run's figure: the Hub's names of task and metric, and what it is called."""

CITATION = r"""@inproceedings{ye2020network,
  title = {Network Deconvolution},
  author = {Ye, Chengxi and Evanusa, Matthew and He, Hua and Mitrokhin, Anton and Goldstein, Tom and Yorke, James A.
    and Ferm{\"u}ller, Cornelia and Aloimonos, Yiannis},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}"""


def model_card(source: Source, repository: str, measured: Measured | None) -> ModelCard:
    """Write the card of a network.

    Args:
        source: the network and its run.
        repository: ORGANISATION/NAME, where it will be.
        measured: what an evaluation just found; None where there was none, which the card says.
    """
    parts = (
        f"# {source.name}",
        _introduction(source),
        _use(source, repository),
        _results(source, measured),
        _training(source),
        _limits(source),
        _origin(source),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    )
    return ModelCard(f"---\n{_data(source, measured).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def eval_results(source: Source, measured: Measured | None) -> dict[str, str]:
    """Return the Hub's form of results, file and text; nothing where there are none, or the client has no such form."""
    dataset, result = _evaluated_on(source), _result(source, measured)
    if dataset is None or result is None or not hasattr(huggingface_hub, "EvalResultEntry"):
        return {}
    entry = huggingface_hub.EvalResultEntry(
        dataset_id=dataset,
        task_id="default",
        value=result.metric_value,
        date=source.result.get("date"),
        notes=f"{result.metric_name}, %; {result.dataset_name}; {_conditions(source, measured)}",
    )
    listed = huggingface_hub.eval_result_entries_to_yaml([entry])
    return {f".eval_results/{source.dataset}.yaml": yaml.safe_dump(listed, sort_keys=False)}


def _data(source: Source, measured: Measured | None) -> ModelCardData:
    result, dataset = _result(source, measured), _hub_dataset(source)
    about = {"model_name": source.name, "eval_results": [result]} if result else {}
    return ModelCardData(
        library_name="timm",
        license=_licence(source),
        pipeline_tag=FIGURES[_figure(source, measured)][0],
        tags=["timm", "timm_deconv", *(["network-deconvolution", "whitening"] if source.whitened else [])],
        datasets=[dataset] if dataset else None,
        **about,
    )


def _result(source: Source, measured: Measured | None) -> EvalResult | None:
    value = measured.value if measured else source.recorded
    if value is None:
        return None
    task, metric, called = FIGURES[_figure(source, measured)]
    return EvalResult(
        task_type=task,
        dataset_type=_evaluated_on(source) or "imagefolder",
        dataset_name=_images(source, measured),
        dataset_split="test" if source.dataset else None,
        metric_type=metric,
        metric_name=called,
        metric_value=round(value, 3),
    )


def _figure(source: Source, measured: Measured | None) -> str:
    if measured:
        return measured.figure
    return "miou" if source.dense else "top1"


def _hub_dataset(source: Source) -> str | None:
    return DATASETS.get(source.dataset, (None, ""))[0]


def _evaluated_on(source: Source) -> str | None:
    """Name the data set of the Hub whose images the figures are of; None where a folder may hold others of its name."""
    return _hub_dataset(source) if source.recipe is not None and source.recipe.dataset else None


def _images(source: Source, measured: Measured | None) -> str:
    """Name the images of the evaluation, with the folder's name where the data set was read from one."""
    called = DATASETS.get(source.dataset, (None, source.dataset))[1]
    folder = measured.data if measured else source.result.get("data", "")
    if folder in ("", source.dataset):
        return called or "images of its kind"
    return f"{called}, images of the folder {folder}" if called else f"images of the folder {folder}"


def _licence(source: Source) -> str:
    cfg: Any = source.model.pretrained_cfg
    return cfg.get("license") or "unknown"


# The text


def _introduction(source: Source) -> str:
    what = "A batch-norm network, the twin of one with deconvolution"
    if source.whitened:
        what = (
            "A network with deconvolution ([Ye et al., ICLR 2020](https://arxiv.org/abs/1905.11926)): every layer"
            " whitens its own input, and there is no batch norm"
        )
    count = sum(parameter.numel() for parameter in source.model.parameters())
    cfg: Any = source.model.pretrained_cfg
    size = " x ".join(map(str, cfg["input_size"]))
    if source.dense:
        what += ". It is for segmentation, and gives a class to each pixel"
    return f"{what}. {count:,} parameters, {source.model.num_classes} classes, input {size}; a plugin of timm knows it."


def _use(source: Source, repository: str) -> str:
    working = "`num_classes`, `in_chans` and `features_only` work as in"
    if source.dense:
        working = "It gives logits (N, classes, H, W). `num_classes` and `in_chans` work as in"
    lines = [
        "## Use",
        "",
        "The package `timm-deconv` registers the network; without `import timm_deconv` timm does not know its name.",
        "",
        "```python",
        "import timm",
        "import timm_deconv",
        "",
        f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
        "```",
        "",
        f'`"hf-hub:{repository}@COMMIT"` pins a revision. {working}',
        "timm. `SHA256SUMS` has the checksums of all files.",
    ]
    if source.whitened:
        lines += [
            "",
            "These weights hold whitening statistics and can be trained on. For inference `timm_deconv.fuse(model)`",
            "folds them into plain layers that compute the same, and `folded/` has these ready:",
            "",
            "```python",
            "from huggingface_hub import snapshot_download",
            "",
            f'folder = snapshot_download("{repository}", allow_patterns="folded/*")',
            'plain = timm.create_model(f"local-dir:{folder}/folded", pretrained=True).eval()',
            "```",
        ]
    return "\n".join(lines)


def _results(source: Source, measured: Measured | None) -> str:
    result = _result(source, measured)
    if result is None:
        return "## Results\n\nNot evaluated."
    how = "Not measured again before it was published (`--no-eval`): the value is what its run recorded."
    if measured:
        again = "measured again" if source.recorded is not None else "measured"
        how = f"{again.capitalize()} on {measured.images:,} images before it was published."
    return (
        f"## Results\n\n| {result.metric_name}, % | images | conditions |\n|---|---|---|\n"
        f"| {result.metric_value:.2f} | {result.dataset_name} | {_conditions(source, measured)} |\n\n{how}"
    )


def _conditions(source: Source, measured: Measured | None) -> str:
    row = source.result
    if not row:
        return f"{measured.images:,} images" if measured else ""
    last = "the best epoch" if source.folder.name == "best" else "the last epoch"
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "timm", "timm_deconv"))
    return (
        f"one run, seed {row['seed']}, {last} of {row['epochs']}, batches of {row['batch_size']};"
        f" {row['hardware'].replace(' 1 threads', ' 1 thread')}, {versions}, {row['date']}"
    )


def _training(source: Source) -> str:
    if source.recipe is None:
        seen = "No images were seen: call `timm_deconv.calibrate(model, loader)` before fine-tuning."
        if not share_notices(source.model).uncalibrated:
            seen = "Whitening was calibrated by images, so fine-tuning starts from the function that evaluation has."
        origin = "How these weights were trained was not recorded."
        if source.tag.startswith(TAG_PREFIX):
            origin = (
                "Not trained by this project: weights that were trained with batch norm, each norm folded into the"
                " layer before it, and whitened so that the function stays."
            )
        return f"## Training\n\n{origin} {seen if source.whitened else ''}".rstrip()
    recipe = source.recipe
    data = " --data-dir DATA" if recipe.data_dir or recipe.dataset != "digits" else ""
    seconds = float(source.result["seconds"])
    return (
        f"## Training\n\nRecipe `{recipe.name}` (hash {recipe.hash()}, all settings in `recipe.yaml`), {recipe.epochs}"
        f" epoch{'' if recipe.epochs == 1 else 's'} in {seconds:,.0f} s:"
        f"\n\n```sh\ntimm-deconv train recipe.yaml{data}\n```\n\n"
        "![Accuracy and loss by epoch](curve.png)"
    )


def _limits(source: Source) -> str:
    cfg: Any = source.model.pretrained_cfg
    _, height, width = cfg["input_size"]
    what = "pixel" if source.dense else "picture"
    lines = [
        f"- It knows {source.model.num_classes} classes and gives any other {what} one of them, often surely.",
        f"- It is made for {height} x {width} pixels; what it does at other sizes was not measured.",
        "- What its training images lack or repeat shows in its errors; errors by group were not measured.",
    ]
    if source.whitened:
        lines.append("- In training, whitening takes its statistics from the batch: those of small batches are noisy.")
    return "\n".join(["## Limits", "", *lines])


def _origin(source: Source) -> str:
    return "\n".join(["## Licence and origin", "", *_origins(source)])


def _origins(source: Source) -> Iterator[str]:
    cfg: Any = source.model.pretrained_cfg
    yield f"- Licence of the weights: {_licence(source)}."
    if source.recipe is None:
        yield f"- Weights: {cfg.get('origin_url') or source.carried_from or 'origin not recorded'}, tag `{source.tag}`."
    else:
        start = source.recipe.pretrained_path or ("timm's" if source.recipe.pretrained else None)
        yield f"- Weights: trained {f'from {start} weights' if start else 'from scratch'} by `timm_deconv`."
        yield f"- Data: {_images(source, None)}. {LICENSES.get(source.dataset, 'Its licence was not recorded')}."
    if source.whitened:
        policy: DeconvPolicy = source.model.deconv_policy  # type: ignore[assignment]
        asked = getattr(source.model, "requested_policy", policy).to_dict()
        yield f"- Whitening settings: `{json.dumps(asked)}`."
