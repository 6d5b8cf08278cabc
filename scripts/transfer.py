#!/usr/bin/env python
"""Transfers a batch-norm network and its weights to a deconvolution network: model.safetensors and config.json.

    python scripts/transfer.py resnet18.a1_in1k transferred/resnet18 --calibrate DATA_DIR
    python scripts/transfer.py regnety_008 transferred/regnety_008 --checkpoint my.safetensors --num-classes 10 --fuse

timm.create_model('local-dir:transferred/resnet18', pretrained=True) loads it, once timm_deconv is imported.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from timm_deconv.convert import calibrate, fuse
from timm_deconv.data.calibration import calibration_loader
from timm_deconv.errors import InputError, one_line_errors
from timm_deconv.models.pretrained import create_transferred
from timm_deconv.models.weights import save_network


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a name of timm.list_models(), with or without a tag, or local-dir:, hf-hub:")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--checkpoint", help="file of the network's weights, in place of those that timm downloads")
    parser.add_argument("--num-classes", type=int, help="of the checkpoint, where it is not the usual number")
    parser.add_argument("--policy", help="a preset's name, or options as JSON: '{\"block\": 32}'")
    parser.add_argument("--keep-affine", action="store_true", help="pre-norm networks: keep the norms' scale and shift")
    parser.add_argument("--calibrate", metavar="DATA", help="folder or tar of images to whiten by, or 'digits'")
    parser.add_argument("--images", type=int, default=1024, help="of them, at most; default 1024")
    parser.add_argument("--image-size", type=int, help="their height and width, where the network trains at others")
    parser.add_argument("--fuse", action="store_true", help="fold whitening away, for inference")
    return parser.parse_args()


def policy_from(text: str | None) -> Any:
    try:
        return json.loads(text) if text and text.startswith("{") else text
    except json.JSONDecodeError as error:
        raise InputError(f"policy {text!r} is not JSON: {error}") from None


def main() -> None:
    args = parse()
    with one_line_errors():
        if args.output.exists() and any(args.output.iterdir()):
            raise InputError(f"{args.output} is not empty: name a new folder")
        classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
        policy = policy_from(args.policy)
        model = create_transferred(
            args.network, args.checkpoint, policy=policy, keep_affine=args.keep_affine, **classes
        ).eval()
        if args.calibrate:
            calibrate(model, calibration_loader(model, args.calibrate, images=args.images, image_size=args.image_size))
        save_network(fuse(model) if args.fuse else model, args.output)
        print(f"{args.output}: load it by timm.create_model('local-dir:{args.output}', pretrained=True)")


if __name__ == "__main__":
    main()
