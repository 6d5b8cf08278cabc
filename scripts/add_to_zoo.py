#!/usr/bin/env python
"""Adds a finished run to the zoo: python scripts/add_to_zoo.py runs/cifar10_e20/... --tag nd_e20_cifar10 --packaged

Writes hub_configs/ARCHITECTURE.TAG.yaml, the weights in float16 (folded, where there is whitening) to
hub_configs/weights or, with --packaged, to hub_configs/packaged, and the run's row to hub_configs/results.
"""

import argparse

from timm_deconv.errors import needs_extra, one_line_errors

with one_line_errors(), needs_extra("train"):
    from timm_deconv.hub.entries import add_entry


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--tag", required=True, help="nd_* for a deconvolution network, no prefix for a batch-norm one")
    parser.add_argument("--packaged", action="store_true", help="let the wheel bring the weights along (2 MB at most)")
    return parser.parse_args()


def main() -> None:
    """Add what the command line names, and print where it is."""
    args = parse()
    with one_line_errors():
        entry = add_entry(args.run, args.tag, packaged=args.packaged)
        folder, file = next(iter(entry.files.items()))
        print(f"hub_configs/{entry.name}.yaml; hub_configs/{folder}/{entry.name}.safetensors, {file.size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
