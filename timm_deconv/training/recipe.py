"""Recipes: every setting of a training run, typed, checked and loaded from YAML.

The keys are timm's (`opt`, `sched`, `model_ema`, ...) where timm has them, and mean the same.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from timm.optim import list_optimizers

from timm_deconv.errors import InputError, unknown_name
from timm_deconv.resources import recipe_files

Triple = tuple[float, float, float]
Rate = Field(ge=0, allow_inf_nan=False)

# what tells two runs apart elsewhere (a result row has columns for them), or changes nothing that is learned
NOT_IN_HASH = {"name", "model", "model_kwargs", "seed", "data_dir", "dataset_download", "workers", "log_interval"}


SGD = ("momentum", "sgd")
OWN_KEYS = {"num_classes": "num_classes", "in_chans": "input_size", "pretrained": "pretrained"}
"""Arguments of `timm.create_model` that a key of the recipe decides."""


class Recipe(BaseModel):
    """Settings of one training run. Frozen; `recipe.model_copy(update=...)` is not checked, `merged` is.

    Attributes:
        name: the recipe's name, for the result row.
        model: a name of `timm.list_models()`.
        model_kwargs: handed to `timm.create_model`.
        pretrained: start from the weights that timm has for the model's name.
        pretrained_path: start from the weights in this file or output folder; what trained a batch-norm network is
            carried over into its deconvolution form. A classifier of another size starts anew.
        calibration_images: of the training set, to whiten by before the first step, in a deconvolution network that
            starts from such weights (see `timm_deconv.calibrate`); 0 starts from whitening by the identity.
        head_init_scale: multiplies the classifier's weights and bias at the start; 0 lets it begin with equal scores.
        freeze_backbone: train the classifier alone; the statistics of norms and whiteners stay too (see
            `timm_deconv.freeze`).
        freeze_bn: batch norms keep their statistics, scale and shift, as by `timm.utils.freeze_batch_norm_2d`.
        dataset: `digits` (embedded), `torch/cifar10` and others of torchvision, `hfds/...`, or '' for folders and tars.
        data_dir: where the data set lies or is downloaded to. A folder with train/ or train.tar is read as it is.
        train_split, val_split: as `timm.data.create_dataset` calls them.
        dataset_download: let torchvision download what is missing.
        train_images, val_images: use so many images only, always the same ones; None for all.
        num_classes: outputs of the classifier.
        input_size: channels, height, width.
        mean, std: per channel, of values in 0..1.
        augmentation: `pad_crop` (zero padding of `crop_padding` pixels, then a random crop), `rrc` (RandomResizedCrop),
            or `none`.
        crop_padding: pixels on each side, for `pad_crop`.
        scale: range of the area that `rrc` keeps.
        hflip: probability of a mirror image in training.
        crop_pct: in evaluation, the input's side over the side resized to.
        interpolation: in resizing.
        batch_size: images in one forward and backward pass, over all processes together.
        grad_accum_steps: passes to one update.
        epochs: passes over the training images; the schedule spans them.
        opt: a name of `timm.optim.list_optimizers()`; `momentum` is SGD without Nesterov, `sgd` with.
        lr, momentum, weight_decay: of the optimiser.
        layer_rates: multiply the rate of each whitened layer by the mean squared norm of its rows at the start;
            for going on from pretrained weights with SGD; the classifier's otherwise (see `rates.layer_rates`).
        filter_bias_and_bn: keep biases and other vectors out of weight decay. The published recipes decay everything.
        clip_grad: largest norm of the gradient, or what `clip_mode` makes of it; None leaves it.
        clip_mode: timm's: 'norm', 'value' (of every element), 'agc' (of every output's gradient, in norms of its
            weights, and as multiplied by `layer_rates`; not in the classifier).
        sched: timm's schedule, stepped at every update.
        warmup_epochs, warmup_lr, min_lr: of the schedule; min_lr where it ends.
        smoothing: label smoothing in the training loss.
        model_ema: average the weights; what is evaluated and saved is then the average.
        model_ema_decay, model_ema_warmup: of the average; with warm-up the decay grows towards model_ema_decay.
        amp, amp_dtype: mixed precision.
        channels_last: memory format of images and weights.
        seed: of weights, order and augmentation.
        workers: processes that load images; 0 loads in the training process.
        log_interval: updates between two looks at the loss for progress bar and tensorboard.
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
    train_images: PositiveInt | None = None
    val_images: PositiveInt | None = None
    num_classes: PositiveInt
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 32, 32)
    mean: Triple | tuple[float]
    std: Triple | tuple[float]
    augmentation: Literal["pad_crop", "rrc", "none"] = "pad_crop"
    crop_padding: int = Field(4, ge=0)
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = Field(0.5, ge=0, le=1)
    crop_pct: float = Field(1.0, gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    batch_size: PositiveInt
    grad_accum_steps: PositiveInt = 1
    epochs: PositiveInt
    opt: str = "momentum"
    lr: float = Field(gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Rate
    layer_rates: bool = False
    filter_bias_and_bn: bool = False
    clip_grad: float | None = Field(None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    sched: Literal["cosine", "tanh", "poly", "step", "constant"] = "cosine"
    warmup_epochs: int = Field(0, ge=0)
    warmup_lr: float = Field(1e-5, ge=0, allow_inf_nan=False)
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    smoothing: float = Field(0.0, ge=0, lt=1)
    model_ema: bool = False
    model_ema_decay: float = Field(0.9998, gt=0, lt=1)
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    channels_last: bool = True
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int = Field(2, ge=0)
    log_interval: PositiveInt = 50

    @field_validator("opt")
    @classmethod
    def _known_optimiser(cls, opt: str) -> str:
        if opt not in (known := list_optimizers()):
            raise unknown_name("optimiser (opt)", opt, known)
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
        if self.calibration_images and not (self.pretrained or self.pretrained_path):
            raise ValueError("calibration_images are for weights to start from; give pretrained or pretrained_path")
        if self.layer_rates and self.opt not in SGD:
            raise ValueError(f"layer_rates is for {' and '.join(SGD)}: opt={self.opt!r} sizes its steps itself")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}; lower it")
        return self

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """A checked recipe.

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
        """This recipe with some settings replaced, checked again."""
        return self.from_dict({**self.model_dump(), **settings})

    def hash(self) -> str:
        """Eight hexadecimal digits that two runs share which differ in model, seed and machine only.

        Settings at their defaults are left out, so that a new option does not change the hash of an old recipe.
        """
        settings = self.model_dump(mode="json", exclude=NOT_IN_HASH, exclude_defaults=True)
        if self.pretrained_path:
            settings["pretrained_path"] = Path(self.pretrained_path).name  # wherever it lies
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def yaml(self) -> str:
        """All settings, defaults included, as `load_recipe` reads them."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name or file, with settings replaced.

    Args:
        name: one of `hub_configs/recipes`, or the path of a YAML file.
        overrides: `key=value`, the value in YAML; `model_kwargs.key=value` for one argument of the model.

    Raises:
        InputError: no such recipe, or see `Recipe.from_dict`.
    """
    return Recipe.from_dict(parse_settings(overrides, _read(name)))


def _read(name: str) -> dict[str, Any]:
    known = recipe_files()
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"no recipe file {name}; a recipe of the package is named without .yaml")
        text, stem = path.read_text(), path.stem
    elif name in known:
        text, stem = known[name].read_text(), name
    else:
        raise unknown_name("recipe", name, known)
    settings = parse_yaml(text, name)
    if not isinstance(settings, dict):
        raise InputError(f"recipe {name} is not a mapping of keys to values")
    return {"name": stem, **settings}


def parse_settings(overrides: Iterable[str], onto: dict[str, Any] | None = None) -> dict[str, Any]:
    """`key=value` texts as a dictionary, over the settings of `onto`; see `load_recipe`."""
    settings = copy.deepcopy(onto or {})
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise InputError(f"{override!r} is not key=value")
        *outer, last = key.split(".")
        target = settings
        for part in outer:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise InputError(f"{override!r}: {part} holds one value, not keys")
        target[last] = parse_yaml(value, override)
    return settings


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, which YAML 1.1 takes for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in the error."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _one_line(error: ValidationError) -> str:
    first, *rest = error.errors()
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part in Recipe.model_fields)
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"recipe key {key!r} is missing; add it"
    shown = f"{key}={first['input']!r}: " if key and not text.startswith("no ") else ""
    return shown + text[:1].lower() + text[1:] + (f" (and {len(rest)} more)" if rest else "")
