#!/usr/bin/env python
"""`timm-deconv convert` from a checkout."""

from timm_deconv.cli import main

if __name__ == "__main__":
    main("convert")
