#!/usr/bin/env python
"""`timm-deconv validate` as a file, which launchers of several processes start."""

from timm_deconv.cli import main

if __name__ == "__main__":
    main("validate")
