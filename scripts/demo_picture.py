#!/usr/bin/env python
"""Draws the picture of the docs' page on the demo: the demo's page with its cat, as a headless chromium shows it."""

import argparse
import io
import shutil
import threading
from pathlib import Path
from typing import Any

from PIL import Image

import timm_deconv  # noqa: F401 registers the models
from timm_deconv.demo import DemoServer, load_pair
from timm_deconv.errors import InputError, needs_extra, one_line_errors

WINDOW = {"width": 1120, "height": 800}
COLOURS = 256


def screenshot(url: str) -> Image.Image:
    """Take a picture of the whole page once it shows what the networks make of the cat."""
    with needs_extra("test"):
        from playwright.sync_api import sync_playwright
    chromium = shutil.which("chromium")
    if chromium is None:
        raise InputError("no chromium on this machine; apt-get install chromium")
    with sync_playwright() as driver:
        browser: Any = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW, color_scheme="light", reduced_motion="reduce")
        page.goto(url)
        page.click("text=the cat")
        page.wait_for_selector("#after:not([hidden])")
        page.mouse.move(0, 0)
        return Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")


def main() -> None:
    """Serve the page and write its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18_025_cifar_deconv", help="the network with deconvolution")
    parser.add_argument("--twin", help="the network with batch norm; default: the one that it is made from")
    parser.add_argument("--output", type=Path, default=Path("docs", "images", "demo.png"))
    args = parser.parse_args()
    with one_line_errors(), DemoServer() as server:
        server.pair = load_pair(args.model, args.twin)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        screenshot(server.url).quantize(COLOURS, kmeans=1).save(args.output, optimize=True)
        server.shutdown()


if __name__ == "__main__":
    main()
