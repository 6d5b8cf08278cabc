"""`timm-deconv convert`."""

import json
from pathlib import Path
from typing import Any

from timm_deconv.errors import InputError

__all__ = ["convert"]


def convert(
    network: str,
    output: Path,
    /,
    *,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    policy: str | None = None,
    keep_affine: bool = False,
    calibrate: str | None = None,
    images: int = 1024,
    image_size: int | None = None,
    fuse: bool = False,
) -> None:
    """Convert a batch-norm network with its weights to one with deconvolution.

    The function stays. The new folder holds model.safetensors and
    config.json; timm.create_model('local-dir:FOLDER', pretrained=True) loads
    it once timm_deconv is imported, and so do the other commands.

        timm-deconv convert resnet18.a1_in1k converted/resnet18 --calibrate DATA
        timm-deconv convert regnety_008 mine --checkpoint my.safetensors --fuse

    Args:
        network: a name of timm.list_models(), with or without a tag, or local-dir:, hf-hub:.
        output: a new folder.
        checkpoint: file of the network's weights, in place of those that timm downloads.
        num_classes: of the checkpoint, where it is not the usual number.
        policy: a preset's name, or options as JSON: '{"block": 32}'.
        keep_affine: of pre-norm networks: keep the norms' scale and shift.
        calibrate: folder or tar of images to whiten by, or 'digits', so that training starts from the same function.
        images: of them, at most.
        image_size: their height and width, where the network trains at others.
        fuse: fold whitening away, for inference.
    """
    from timm_deconv.convert import calibrate as whiten
    from timm_deconv.convert import fuse as fold
    from timm_deconv.data.evaluation import picture_loader
    from timm_deconv.models.pretrained import create_transferred
    from timm_deconv.models.weights import check_new_folder, save_network

    check_new_folder(output)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    options = {"policy": _policy(policy), "keep_affine": keep_affine}
    model = create_transferred(network, checkpoint, **options, **classes).eval()
    if calibrate:
        whiten(model, picture_loader(model, calibrate, images=images, image_size=image_size))
    save_network(fold(model) if fuse else model, output)
    print(f"{output}: load it by timm.create_model('local-dir:{output}', pretrained=True)")


def _policy(text: str | None) -> Any:
    try:
        return json.loads(text) if text and text.startswith("{") else text
    except json.JSONDecodeError as error:
        raise InputError(f"policy {text!r} is not JSON: {error}") from None
