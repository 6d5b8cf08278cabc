"""Trained networks in files that need nothing of this package: plain layers, written in one of several formats.

What is written is checked before it gets its name: its outputs are compared with those of the network itself.
"""

from .network import Export, export_network
from .report import Request, export_and_measure

__all__ = ["Export", "Request", "export_and_measure", "export_network"]
