"""What a person sees of a run: a bar on a terminal, one line an epoch elsewhere, nothing on other processes."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm


class Display:
    """Progress of one run.

    Args:
        visible: False on all but the main process.
        epochs: of the whole run.
        stream: where to write.
    """

    def __init__(self, visible: bool, epochs: int, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.visible = visible
        self.epochs = epochs
        self.bar: tqdm | None = None

    def start_epoch(self, epoch: int, images: int) -> None:
        """Begins the bar of an epoch (counted from 0) over this many images."""
        self.started = time.perf_counter()
        if self.visible and self.stream.isatty():
            label = f"epoch {epoch + 1}/{self.epochs}"
            self.bar = tqdm(total=images, desc=label, unit="img", file=self.stream, leave=False, dynamic_ncols=True)

    def advance(self, images: int) -> None:
        """Counts images seen."""
        if self.bar is not None:
            self.bar.update(images)

    def show(self, figures: Mapping[str, float]) -> None:
        """Puts figures beside the bar."""
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)

    def end_epoch(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.visible:
            print(text, file=self.stream, flush=True)
