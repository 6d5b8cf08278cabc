#!/usr/bin/env python
"""What becomes of a pretrained ImageNet network on real photographs: carried over, calibrated, fused, and in training.

    python scripts/carry_over.py PHOTOGRAPHS
    python scripts/carry_over.py PHOTOGRAPHS --network resnet18 --checkpoint resnet18.pth --presets fast

PHOTOGRAPHS is a folder or tar of images in folders by synset (n01440764, ...). Prints a table; the rows go to --output,
and with --record to hub_configs/results of the checkout too.
"""

import argparse
from pathlib import Path

from timm_deconv.benchmark import fidelity, rows
from timm_deconv.errors import one_line_errors

FILE = "carry_over.csv"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs")
    parser.add_argument("--network", default="tf_efficientnet_lite0", help="of timm, with batch norm")
    parser.add_argument("--checkpoint", help="file of its weights, in place of timm's or a package's")
    parser.add_argument("--presets", nargs="+", default=["paper", "fast"])
    parser.add_argument("--images", type=int, help="use so many; default all")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--output", default=Path("output", FILE), type=Path, help="CSV file to add rows to")
    parser.add_argument("--record", action="store_true", help="to the checkout's results too")
    return parser.parse_args()


def main() -> None:
    options = vars(parse())
    output, record, presets = (options.pop(key) for key in ("output", "record", "presets"))
    with one_line_errors():
        files = rows.result_files(output, record, FILE)
        measured = fidelity.fidelity_rows(fidelity.FidelitySettings(presets=tuple(presets), **options))
        rows.add_rows(files, fidelity.COLUMNS, measured)
        print(rows.table(measured, fidelity.SHOWN))


if __name__ == "__main__":
    main()
