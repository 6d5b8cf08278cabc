#!/usr/bin/env python
"""`timm-deconv train` as a file, for launchers of several processes: accelerate launch scripts/train.py digits."""

from timm_deconv.cli import main

if __name__ == "__main__":
    main("train")
