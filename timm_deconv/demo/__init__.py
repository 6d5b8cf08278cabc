"""A local page that shows what a network with deconvolution and its twin with batch norm say of a picture."""

from .pair import Pair, load_pair
from .server import DemoServer

__all__ = ["DemoServer", "Pair", "load_pair"]
