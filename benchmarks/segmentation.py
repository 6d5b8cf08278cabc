"""Fine-tuning to dense prediction: a pretrained encoder with dilated last stages, and an ASPP head, on CamVid.

Brostow et al., Semantic object classes in video, Pattern Recognition Letters 2009: 11 classes, the rest is ignored.
"""

import io
import math
import tarfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import hflip, pil_to_tensor

from timm_deconv.convert import calibrate, convert_deconv_model, transfer
from timm_deconv.data import EpochSampler, Seeded
from timm_deconv.data.datasets import find_split
from timm_deconv.errors import InputError
from timm_deconv.models.deeplabv3 import ASPP
from timm_deconv.training.initial_weights import check_loaded, pretrained_arguments
from timm_deconv.training.recipe import Recipe
from timm_deconv.training.tasks import Batch, Normalise

__all__ = ["CamVid", "Segmentation", "Segmenter"]

CLASSES = 11
IGNORED = 255
HEAD_CHS = 128
RATES = (3, 6, 9)
"""Dilations of the ASPP: those of DeepLabV3 for maps of 33 positions, for ours of 15."""


class CamVid(Dataset[tuple[Tensor, Tensor]]):
    """Frames (3, H, W) and masks (H, W), both uint8, of a tar with `images/NAME.jpg` and `masks/NAME.png`.

    Args:
        path: the tar.
        size: height and width that both are resized to.
        mirrored: mirror every other frame at random.

    Raises:
        InputError: no such tar, or a frame without a mask.
    """

    def __init__(self, path: Path, size: tuple[int, int], mirrored: bool) -> None:
        if not path.is_file():
            raise InputError(f"no {path}: CamVid is read from tars of images/ and masks/")
        self.mirrored = mirrored
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
        names = sorted(Path(name).stem for name in files if name.startswith("images/"))
        if missing := [name for name in names if not {f"images/{name}.jpg", f"masks/{name}.png"} <= files.keys()]:
            raise InputError(f"{path}: no images/{missing[0]}.jpg with masks/{missing[0]}.png")
        self.pairs = [
            (_image(files[f"images/{name}.jpg"], size), _mask(files[f"masks/{name}.png"], size)) for name in names
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        return (hflip(image), hflip(mask)) if self.mirrored and torch.rand(()) < 0.5 else (image, mask)


def _image(content: bytes, size: tuple[int, int]) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return pil_to_tensor(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))


def _mask(content: bytes, size: tuple[int, int]) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        mask = pil_to_tensor(image.resize(size[::-1], Image.Resampling.NEAREST))[0]
    return torch.where(mask < CLASSES, mask, IGNORED)


class Segmenter(nn.Module):
    """An encoder of timm at output stride 16, an ASPP and a 1x1 classifier, enlarged to the input: (N, 11, H, W)."""

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes, self.num_features = num_classes, HEAD_CHS
        self.pretrained_cfg = {**encoder.default_cfg, "architecture": "segmenter"}  # which saving asks for
        self.head = nn.Sequential(
            ASPP(encoder.feature_info.channels()[-1], HEAD_CHS, RATES, drop_rate=0.1),  # type: ignore[operator, union-attr]
            nn.Conv2d(HEAD_CHS, num_classes, 1),
        )

    def get_classifier(self) -> nn.Module:
        """Return the last convolution."""
        return self.head[1]

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.encoder(x)[-1])
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)


class Segmentation:
    """Cross entropy of labelled pixels, and the mean over classes of intersection over union.

    A task as the training loop asks for it (`timm_deconv.training.tasks.Task`). A batch is uint8 images (B, 3, H, W)
    and masks (B, H, W); its figures are those of `_figures`.

    Raises:
        InputError: the recipe has a setting that is not for CamVid.
    """

    columns = ("loss", *(f"both{i}" for i in range(CLASSES)), *(f"either{i}" for i in range(CLASSES)))
    headline = "miou"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        _check_settings(recipe)
        self.recipe, self.device = recipe, device
        self.normalise = Normalise(recipe, device)

    def create_model(self) -> nn.Module:
        recipe = self.recipe
        name, deconv = _batch_norm_name(recipe.model), recipe.model_kwargs.get("deconv")
        arguments = {"features_only": True, "out_indices": (4,), "output_stride": 16}
        model = Segmenter(timm.create_model(name, **pretrained_arguments(recipe), **arguments), recipe.num_classes)
        check_loaded(recipe, model.encoder)
        if recipe.freeze_bn and deconv is None:
            freeze_batch_norm_2d(model.encoder)
        if deconv is not None:
            transfer(model.encoder, deconv, input_size=recipe.input_size)
            convert_deconv_model(model.head, deconv)
        for parameter in model.get_classifier().parameters():
            nn.init.zeros_(parameter)
        return model.to(memory_format=torch.channels_last) if recipe.channels_last else model

    def create_loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        return self._loader(self.recipe.train_split, True), self._loader(self.recipe.val_split, False)

    def calibrate(self, model: nn.Module) -> None:
        if images := self.recipe.calibration_images:
            loader = self._loader(self.recipe.train_split, False)
            batches = islice(loader, math.ceil(images / self.recipe.batch_size))
            encoder: nn.Module = model.encoder  # type: ignore[assignment]  # the head is new: there is nothing to keep
            calibrate(encoder, (self.normalise(batch.to(self.device)) for batch, _ in batches))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        images, masks = batch
        logits = model(self.normalise(images)).float()
        loss = F.cross_entropy(logits, masks.long(), ignore_index=IGNORED)
        return loss, _figures(loss.detach(), logits.detach(), masks)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model, batch)[1]

    def summarise(self, total: Tensor, images: int) -> Mapping[str, float]:
        both, either = total[1:].double().chunk(2)
        return {"loss": total[0].item() / images, "miou": 100 * (both / either.clamp(min=1)).mean().item()}

    def _loader(self, split: str, training: bool) -> DataLoader[Any]:
        if self.recipe.data_dir is None or (path := find_split(Path(self.recipe.data_dir), split)) is None:
            raise InputError(f"no {split}.tar in {self.recipe.data_dir}: give the folder of CamVid as --data-dir")
        frames = CamVid(path, self.recipe.input_size[1:], training)
        if not training:
            return DataLoader(frames, self.recipe.batch_size)
        order = EpochSampler(len(frames), self.recipe.batch_size, self.recipe.seed)
        return DataLoader(Seeded(frames, self.recipe.seed), batch_sampler=order)


def _check_settings(recipe: Recipe) -> None:
    if recipe.num_classes != CLASSES:
        raise InputError(f"num_classes={recipe.num_classes}: CamVid has {CLASSES}")
    for setting in ("freeze_backbone", "train_images", "val_images", "smoothing"):
        if getattr(recipe, setting):
            raise InputError(f"{setting}={getattr(recipe, setting)}: CamVid is trained without it; leave it out")


def _batch_norm_name(model: str) -> str:
    base = model.removesuffix("_deconv")
    return f"{base}_bn" if timm.is_model(f"{base}_bn") else base


def _figures(loss: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    """Count pixels by class and image.

    Args:
        loss: a scalar.
        logits: (N, classes, H, W).
        masks: (N, H, W), classes and IGNORED.

    Returns:
        (N, 1 + 2 * classes): the loss, the pixels both named and labelled as each class, and those that are either.
    """
    named = F.one_hot(logits.argmax(1).flatten(1), CLASSES).bool()
    labelled = F.one_hot(masks.long().clamp(max=CLASSES).flatten(1), CLASSES + 1).bool()
    named = named & ~labelled[..., CLASSES:]
    labelled = labelled[..., :CLASSES]
    counts = [(named & labelled).sum(1), (named | labelled).sum(1)]
    return torch.cat([loss.expand(len(masks), 1), *(count.float() for count in counts)], 1)
