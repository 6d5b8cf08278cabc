"""Run the Python blocks of pages in order, one namespace a page, and say which failed: a line of JSON, {place: error}.

A program of its own, as the address of the Hub is read when libraries are imported. Blocks find `loader`, batches of
images and classes. Blocks behind a comment `not run: REASON` are only compiled.
"""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.docs.pages import ROOT, blocks


def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make batches of random images, as many as the classifiers of the pages have features: calibration needs them."""
    torch.manual_seed(0)
    return [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(8)]


def run(page: Path) -> dict[str, str]:
    """Return the errors of a page's blocks by place."""
    module = sys.modules[page.stem] = ModuleType(page.stem)  # where timm looks for networks that a block registers
    namespace: dict[str, Any] = vars(module)
    namespace["loader"] = loader()
    errors = {}
    for block in blocks(page, "python"):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        try:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            if not block.comment.startswith("not run: "):
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, namespace)
        except Exception:
            errors[place] = traceback.format_exc(limit=-3)
    return errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for page in map(Path, sys.argv[1:]):
        found |= run(page)
    print(json.dumps(found))
