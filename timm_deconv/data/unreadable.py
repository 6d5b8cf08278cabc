"""Files that are no pictures: they stop the run, or so many of them are left out."""

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

from timm_deconv.errors import InputError

from .images import UNREADABLE

__all__ = ["NO_CLASS", "Unreadable"]

NO_CLASS = -1
"""Target of an image that is not to count."""


class Unreadable:
    """What is done about images that cannot be read or decoded.

    Args:
        limit: so many different ones are left out, each named on standard error; one more stops the run. They are
            counted over the workers of a process.
        replaced: in training the next readable image stands in for one. In evaluation an empty picture of `NO_CLASS`
            does, which does not count.
    """

    def __init__(self, limit: int = 0, *, replaced: bool = True) -> None:
        self.limit, self.replaced = limit, replaced
        # in memory that workers share
        self.seen = multiprocessing.Array("q", [-1] * limit) if limit else None

    def readable(
        self, read: Callable[[int], Any], index: int, length: int, name: Callable[[int], str], empty: Callable[[], Any]
    ) -> Any:
        """Read an image and what belongs to it, or what stands in for it.

        Args:
            read: reads by index.
            index: of the image.
            length: images of the data set.
            name: says where an image lies.
            empty: makes what does not count.

        Raises:
            OSError: an image cannot be read, and as many were left out as may be; names its path and index.
        """
        for tried in range(length):
            place = (index + tried) % length
            try:
                return read(place)
            except InputError:
                raise
            except UNREADABLE as error:
                self._count(place, name(place), error)
            if not self.replaced:
                return empty()
        raise OSError(f"none of {length} images can be read")

    def _count(self, index: int, name: str, error: Exception) -> None:
        told = f"unreadable image {name} (index {index}): {error}"
        if self.seen is None:
            raise OSError(f"{told}; replace or remove it, or leave out so many by max_unreadable") from None
        with self.seen.get_lock():
            seen = [each for each in self.seen if each >= 0]
            if index in seen:
                return
            if len(seen) == self.limit:
                raise OSError(f"{told}; {self.limit} were left out before, as many as max_unreadable allows") from None
            self.seen[len(seen)] = index
        print(f"left out: {told} ({len(seen) + 1} of at most {self.limit})", file=sys.stderr, flush=True)
