"""Recipes: every setting of a training run, typed, checked and loaded from YAML.

The keys are timm's (`opt`, `sched`, `model_ema`, ...) where timm has them, and mean the same.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from timm.optim import list_optimizers
from yaml import YAMLError

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.resources import recipe_files

Triple = tuple[float, float, float]

# result rows have columns of their own for the first four; the others change nothing that is learned
NOT_IN_HASH = {
    *("name", "model", "model_kwargs", "seed", "data_dir", "dataset_download", "workers", "log_interval"),
    *("max_unreadable", "cache", "checkpoint_every", "process_timeout", "log_with", "health_interval"),
    *("grad_checkpointing", "torchcompile", "torchcompile_mode", "torchcompile_regions"),
}

INTERVAL = re.compile(r"(?P<updates>[1-9]\d*)( steps?)?|(?P<minutes>\d*\.?\d+) min")

SGD = ("momentum", "sgd")
OWN_KEYS = {"num_classes": "num_classes", "in_chans": "input_size", "pretrained": "pretrained"}
"""Arguments of `timm.create_model` that a key of the recipe decides."""


class Recipe(BaseModel):
    """Settings of one training run, frozen; `merged` returns a changed copy.

    Attributes:
        name: the recipe's name, for the result row.
        model: a name of `timm.list_models()`.
        model_kwargs: handed to `timm.create_model`.
        pretrained: start from the weights that timm has for the model's name.
        pretrained_path: start from the weights in this file or output folder; those of a batch-norm network are
            transferred into its deconvolution form. A classifier of another size starts anew.
        calibration_images: training images by which a deconvolution network that starts from such weights is calibrated
            before the first step (see `timm_deconv.calibrate`); 0 starts from whitening by the identity.
        head_init_scale: multiplies the classifier's weights and bias at the start; 0 lets it begin with equal scores.
        freeze_backbone: train the classifier alone; the statistics of norms and whiteners stay too (see
            `timm_deconv.freeze`).
        freeze_bn: keep statistics, scale and shift of batch norms, as `timm.utils.freeze_batch_norm_2d` does.
        dataset: `digits` (embedded), `torch/cifar10` and others of torchvision, '' for folders and tars, `hfds/NAME` of
            the Hub, or a stream, `hfids/NAME` of the Hub or `wds/` for shards; for segmentation `cityscapes`, `camvid`,
            or `masks` for folders and tars of images/ and masks/.
        data_dir: where the data set lies or is downloaded to. A folder with train/ or train.tar is read as it is.
        train_split, val_split: as `timm.data.create_dataset` calls them.
        dataset_download: let torchvision download what is missing.
        input_key, target_key: as timm's scripts call the columns of images and classes, of `hfds`, `hfids` and `wds`.
        max_unreadable: so many different images that cannot be read are left out, in each process, before the run
            stops; they are named. In training the next one stands in for such an image, in evaluation it does not
            count.
        cache: 'device' keeps the images as bytes on the card (or in memory) and cuts and mirrors them there, with the
            distribution of `pad_crop`; for small sets of images of one size.
        train_images, val_images: use so many images only, always the same ones; None for all.
        num_classes: outputs of the classifier.
        input_size: channels, height, width.
        mean, std: per channel, of values in 0..1.
        augmentation: `pad_crop` (zero padding of `crop_padding` pixels, then a random crop), `rrc` (RandomResizedCrop),
            or `none`; for masks `scale_crop` (resized at random, then a random window) or `none`.
        aa: RandAugment by timm, as in 'rand-m9-mstd0.5-inc1', with `pad_crop` and `rrc`.
        mixup, cutmix: alpha of the beta distribution by which timm mixes the images of a batch; 0 leaves them. With
            both, each batch is mixed in one of the two ways.
        progressive_sizes: heights of training images (widths in proportion) in equal parts of the epochs: images that
            were cut out at `input_size` are resized on the device. None of them, and all are of `input_size`.
        crop_padding: pixels on each side, for `pad_crop`.
        scale: range of the area that `rrc` keeps, or of the factor that `scale_crop` resizes by.
        hflip: probability of a mirror image in training.
        crop_pct: in evaluation, the input's side over the side resized to; with `scale_crop` in training too, before
            `scale`, and evaluation keeps the whole image.
        interpolation: in resizing.
        batch_size: images in one forward and backward pass, over all processes together.
        grad_accum_steps: passes to one update.
        epochs: passes over the training images; the schedule spans them.
        opt: a name of `timm.optim.list_optimizers()`; `momentum` is SGD without Nesterov, `sgd` with.
        opt_kwargs: further arguments of the optimiser, such as `betas`.
        lr, momentum, weight_decay: of the optimiser.
        layer_decay: multiplies the rate of a layer by this to the power of its distance from the classifier.
        layer_rates: multiply the rate of each whitened layer by the mean squared norm of its rows at the start;
            for going on from pretrained weights with SGD; the classifier's otherwise (see `lr_scale.layer_lr_scales`).
        filter_bias_and_bn: keep biases and other vectors out of weight decay. The published recipes decay everything.
        aux_weight: of the loss of a network's auxiliary head (`model_kwargs.aux_head=true`).
        aux_lr_scale: multiplies the rate of that head.
        clip_grad: largest norm of the gradient, or what `clip_mode` makes of it; None leaves it.
        clip_mode: timm's: 'norm', 'value' (of every element), 'agc' (of every output's gradient, in norms of its
            weights, and as multiplied by `layer_rates`; not in the classifier).
        sched: timm's schedule, stepped at every update.
        decay_rate: of the schedules `step` and `multistep`, or the power of `poly`.
        warmup_epochs, warmup_lr, min_lr: of the schedule; min_lr where it ends.
        sched_kwargs: further arguments of `timm.scheduler.create_scheduler_v2`, such as `decay_milestones`, in epochs.
        smoothing: label smoothing in the training loss.
        model_ema: average the weights; what is evaluated and saved is then the average.
        model_ema_decay, model_ema_warmup: of the average; with warm-up the decay grows towards model_ema_decay.
        amp, amp_dtype: mixed precision.
        channels_last: memory format of images and weights.
        grad_checkpointing: run blocks a second time for their gradients in place of keeping what is in them.
        torchcompile: the backend by which torch compiles the network; None leaves it as it is.
        torchcompile_mode: torch's.
        torchcompile_regions: compile the blocks of the network, each for itself, which takes less time than the whole.
        seed: of weights, order and augmentation.
        workers: processes that load images; 0 loads in the training process.
        log_interval: updates between two looks at the loss for progress bar and trackers.
        log_with: the trackers, by accelerate's names; wandb and trackio where they are installed.
        health_interval: updates between two looks at how well each layer whitens; 0 never looks. A look takes a pass
            over one batch.
        checkpoint_every: save what `--resume` goes on from after so many updates ('500') or minutes ('10 min'); it is
            saved after every epoch in any case.
        nonfinite: what a loss that is NaN or infinite does: 'stop' ends the run, 'skip' leaves the update out, 'rewind'
            also goes back to the last checkpoint's weights and optimiser, and on with the images that follow.
        nonfinite_limit: so many updates of a run may be left out in that way; one more stops it.
        process_timeout: minutes that a process waits for the others before it ends.
        sync_statistics: take the statistics of whitening layers, and of batch norms on GPUs, from the batches of all
            processes, so that these learn what one process learns; else each takes its own, and running values are
            averaged for evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = "custom"
    model: str
    model_kwargs: dict[str, Any] = {}
    pretrained: bool = False
    pretrained_path: str | None = None
    calibration_images: int = Field(0, ge=0)
    head_init_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    freeze_backbone: bool = False
    freeze_bn: bool = False
    dataset: str
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    dataset_download: bool = False
    input_key: str | None = None
    target_key: str | None = None
    max_unreadable: int = Field(0, ge=0)
    cache: Literal["device"] | None = None
    train_images: PositiveInt | None = None
    val_images: PositiveInt | None = None
    num_classes: PositiveInt
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 32, 32)
    mean: Triple | tuple[float]
    std: Triple | tuple[float]
    augmentation: Literal["pad_crop", "rrc", "scale_crop", "none"] = "pad_crop"
    aa: str | None = None
    mixup: float = Field(0.0, ge=0, allow_inf_nan=False)
    cutmix: float = Field(0.0, ge=0, allow_inf_nan=False)
    progressive_sizes: tuple[PositiveInt, ...] = ()
    crop_padding: int = Field(4, ge=0)
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = Field(0.5, ge=0, le=1)
    crop_pct: float = Field(1.0, gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    batch_size: PositiveInt
    grad_accum_steps: PositiveInt = 1
    epochs: PositiveInt
    opt: str = "momentum"
    opt_kwargs: dict[str, Any] = {}
    lr: float = Field(gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    layer_decay: float | None = Field(None, gt=0, le=1)
    layer_rates: bool = False
    filter_bias_and_bn: bool = False
    aux_weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    aux_lr_scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    clip_grad: float | None = Field(None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    sched: Literal["cosine", "tanh", "poly", "step", "multistep", "wsd", "rsqrt", "constant"] = "cosine"
    decay_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    warmup_epochs: int = Field(0, ge=0)
    warmup_lr: float = Field(1e-5, ge=0, allow_inf_nan=False)
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    sched_kwargs: dict[str, Any] = {}
    smoothing: float = Field(0.0, ge=0, lt=1)
    model_ema: bool = False
    model_ema_decay: float = Field(0.9998, gt=0, lt=1)
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    channels_last: bool = True
    grad_checkpointing: bool = False
    torchcompile: Literal["inductor", "cudagraphs", "aot_eager", "eager"] | None = None
    torchcompile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    torchcompile_regions: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int = Field(2, ge=0)
    log_interval: PositiveInt = 50
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    health_interval: int = Field(500, ge=0)
    checkpoint_every: str | None = None
    nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    nonfinite_limit: PositiveInt = 10
    process_timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    sync_statistics: bool = True

    @field_validator("dataset", mode="before")
    @classmethod
    def _of_folders(cls, dataset: Any) -> Any:
        return "" if dataset is None else dataset  # `dataset=` of a command line

    @field_validator("log_with", mode="before")
    @classmethod
    def _of_one(cls, trackers: Any) -> Any:
        return (trackers,) if isinstance(trackers, str) else trackers

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _is_an_interval(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int) else value
        if isinstance(text, str) and not INTERVAL.fullmatch(text):
            raise ValueError("neither a number of updates (500) nor of minutes ('10 min')")
        return text

    @field_validator("opt")
    @classmethod
    def _known_optimiser(cls, opt: str) -> str:
        if opt not in (known := list_optimizers()):
            raise unknown_name("optimiser (opt)", opt, known)
        if opt == "adahessian":
            raise ValueError("it needs second derivatives, which training does not compute")
        return opt

    @field_validator("std")
    @classmethod
    def _positive_std(cls, std: tuple[float, ...]) -> tuple[float, ...]:
        if min(std) <= 0:
            raise ValueError("standard deviations are positive")
        return std

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ValueError(f"mean and std need {self.input_size[0]} values, one a channel of input_size")
        for argument, key in OWN_KEYS.items():
            if argument in self.model_kwargs:
                raise ValueError(f"model_kwargs.{argument} is decided by {key}; set that")
        if self.aa is not None and (not self.aa.startswith("rand-") or self.augmentation not in ("pad_crop", "rrc")):
            raise ValueError(f"aa={self.aa!r}: it is RandAugment ('rand-m9-mstd0.5-inc1') with pad_crop or rrc")
        if self.cache and (self.aa or self.augmentation not in ("pad_crop", "none")):
            raise ValueError("cache=device cuts out by pad_crop or not at all (none), without aa")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size}: mixup and cutmix pair the images of a batch; make it even")
        if len(self.progressive_sizes) > self.epochs:
            raise ValueError(f"progressive_sizes={self.progressive_sizes} are more than epochs={self.epochs}")
        if self.calibration_images and not (self.pretrained or self.pretrained_path):
            raise ValueError("calibration_images are for weights to start from; give pretrained or pretrained_path")
        if self.layer_decay is not None and (self.layer_rates or self.aux_lr_scale != 1):
            raise ValueError("layer_decay scales the rates that layer_rates and aux_lr_scale do; set one of them")
        if (self.torchcompile_mode or self.torchcompile_regions) and self.torchcompile is None:
            raise ValueError("torchcompile_mode and torchcompile_regions need torchcompile; torchcompile=inductor")
        if self.layer_rates and self.opt not in SGD:
            raise ValueError(f"layer_rates is for {' and '.join(SGD)}: opt={self.opt!r} sizes its steps itself")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}; lower it")
        return self

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Return the recipe of these settings, checked.

        Raises:
            InputError: an unknown key (with the nearest known one), a missing one, or a value that makes no sense.
        """
        for key in settings:
            if key not in cls.model_fields:
                raise unknown_name("recipe key", str(key), cls.model_fields)
        try:
            return cls(**settings)
        except ValidationError as error:
            raise InputError(_one_line(error)) from None

    def merged(self, settings: dict[str, Any]) -> Self:
        """Return this recipe with some settings replaced, checked again as by `from_dict`."""
        return self.from_dict({**self.model_dump(), **settings})

    def hash(self) -> str:
        """Return eight hexadecimal digits, equal for runs that differ in model, seed and machine only.

        Settings at their defaults are left out, so that a new option does not change the hash of an old recipe.
        """
        settings = self.model_dump(mode="json", exclude=NOT_IN_HASH, exclude_defaults=True)
        if self.pretrained_path:
            settings["pretrained_path"] = Path(self.pretrained_path).name  # wherever it lies
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def yaml(self) -> str:
        """Return all settings, defaults included, as `load_recipe` reads them."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by name or file, with settings replaced.

    Args:
        name: one of `hub_configs/recipes`, or the path of a YAML file.
        overrides: see `parse_settings`.

    Raises:
        InputError: no such recipe, or see `parse_settings` and `Recipe.from_dict`.
    """
    known = recipe_files()
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"no recipe file {name}; a recipe of the package is named without .yaml")
        file, stem = Path(name), Path(name).stem
    elif name in known:
        file, stem = known[name], name
    else:
        raise unknown_name("recipe", name, known)
    with _readable(name), file.open() as text:
        settings = OmegaConf.to_container(OmegaConf.load(text))
    if not isinstance(settings, dict):
        raise InputError(f"recipe {name} is not a mapping of keys to values")
    return Recipe.from_dict(parse_settings(overrides, {"name": stem, **settings}))


def parse_settings(overrides: Iterable[str], onto: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return settings with `key=value` texts applied in turn.

    Args:
        overrides: the value is YAML and replaces what the key held; `model_kwargs.key=value` sets one argument of the
            model, `mean[0]=value` one element.
        onto: the settings to begin with; they are not changed.

    Raises:
        InputError: a text without `=`, a value that is not YAML, or a key below one that holds a single value.
    """
    config = OmegaConf.create(onto or {})
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise InputError(f"{override!r} is not key=value")
        for outer in accumulate(key.split(".")[:-1], "{}.{}".format):
            held = OmegaConf.select(config, outer)
            if held is not None and not OmegaConf.is_dict(held):
                raise InputError(f"{override!r}: {outer} holds one value, not keys")
        with _readable(override):
            value = OmegaConf.from_dotlist([f"value={text}"])["value"]
            OmegaConf.update(config, key, value, merge=False)
    return OmegaConf.to_container(config)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Name the file or text that is not YAML, in one line."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _one_line(error: ValidationError) -> str:
    """Say what is wrong with the first of the keys at fault, and how many more there are."""
    first, *rest = error.errors()
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part in Recipe.model_fields)
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"recipe key {key!r} is missing; add it"
    shown = f"{key}={first['input']!r}: " if key and not text.startswith("no ") else ""
    return shown + text[:1].lower() + text[1:] + (f" (and {len(rest)} more)" if rest else "")
