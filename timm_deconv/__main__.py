"""python -m timm_deconv SCRIPT.py [arguments]: run a script that knows nothing of this package with its networks.

So timm's own train.py, validate.py, inference.py and benchmark.py take --model resnet18_cifar_deconv. With --calibrate
the networks that they make of batch-norm weights are calibrated on images before the optimiser sees them. Where they
synchronise batch norms (train.py --sync-bn), whitening layers' statistics are synchronised too.
"""

import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import timm.layers
import torch
from torch import nn

from timm_deconv.convert import calibrate, convert_sync
from timm_deconv.data.evaluation import picture_loader
from timm_deconv.errors import InputError
from timm_deconv.models.registration import when_transferred

USAGE = """\
usage: python -m timm_deconv [--calibrate DATA [--images N] [--image-size N]] SCRIPT.py [arguments]

Runs the script as `python SCRIPT.py [arguments]` would, with the deconvolution networks registered with timm. Where it
calls timm.layers.convert_sync_batchnorm (train.py --sync-bn), whitening layers are synchronised as by convert_sync.

  --calibrate DATA   folder or tar of images, or 'digits': networks that timm.create_model makes of batch-norm weights
                     (pretrained=True) are calibrated on them, so that training starts from the function of the weights
  --images N         use N of them, always the same; default 1024
  --image-size N     at the size that the script trains at (its own --img-size); default the network's configuration"""

COUNTS = {"--images": "images", "--image-size": "image_size"}


class Calibrator:
    """Calibrates networks as they are created.

    The images are the same in every process and drawn without touching the script's random numbers.

    Args:
        data: folder or tar of images, or `digits`.
        images: how many, at most.
        image_size: height and width; None for those of each network's configuration.
    """

    def __init__(self, data: str, images: int = 1024, image_size: int | None = None) -> None:
        self.data, self.images, self.image_size = data, images, image_size
        self.networks = 0

    def __call__(self, model: nn.Module) -> None:
        """Calibrate a network.

        Raises:
            SystemExit: with one line, where the images cannot be had or are too few.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                loader = picture_loader(model, self.data, images=self.images, image_size=self.image_size)
                calibrate(model, loader)
        except (InputError, OSError) as error:
            raise SystemExit(f"--calibrate {self.data}: {' '.join(str(error).split())}") from error
        self.networks += 1
        self.say(f"calibrated {model.pretrained_cfg['architecture']} on {len(loader.dataset)} images of {self.data}")

    def say(self, text: str) -> None:
        """Print a line on stderr in the first process."""
        if os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> tuple[Calibrator | None, list[str]]:
    """Split the command line into what calibrates, if anything does, and the script with its own arguments.

    Raises:
        InputError: an option without a value, or with one that makes no sense.
    """
    given: dict[str, str] = {}
    while arguments and arguments[0].partition("=")[0] in ("--calibrate", *COUNTS):
        name, sign, value = arguments[0].partition("=")
        if not sign and len(arguments) < 2:
            raise InputError(f"{name} needs a value")
        given[name] = value if sign else arguments[1]
        arguments = arguments[1 if sign else 2 :]
    data = given.pop("--calibrate", None)
    for name, value in given.items():
        if data is None:
            raise InputError(f"{name} is for --calibrate DATA, which is missing")
        if not value.isdecimal() or int(value) < 1:
            raise InputError(f"{name} {value}: a whole number, at least 1")
    if data is None:
        return None, arguments
    if data != "digits" and not Path(data).exists():
        raise InputError(f"--calibrate {data}: no such folder or tar")
    return Calibrator(data, **{COUNTS[name]: int(value) for name, value in given.items()}), arguments


def main() -> None:
    """Run the script that the command line names.

    Raises:
        SystemExit: with the usage, where it names none.
    """
    try:
        calibrator, command = parse(sys.argv[1:])
    except InputError as error:
        raise SystemExit(f"{error}\n\n{USAGE}") from None
    if not command:
        raise SystemExit(USAGE)
    if command[0] in ("-h", "--help"):
        print(USAGE)
        return
    script = Path(command[0])
    if not script.is_file():
        raise SystemExit(f"no script {str(script)!r}\n\n{USAGE}")
    if calibrator is not None:
        when_transferred(calibrator)
    sys.argv = command
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    with patch.object(timm.layers, "convert_sync_batchnorm", convert_sync):  # which leaves batch norms to timm's own
        runpy.run_path(str(script), run_name="__main__")
    if calibrator is not None and not calibrator.networks:
        calibrator.say("--calibrate: the script has created no network of transferred weights; nothing was calibrated")


if __name__ == "__main__":
    main()
