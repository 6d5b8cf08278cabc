"""Publishing: what goes up of a trained network, its card, and the upload."""

from .publish import Published, dry_run, push
from .tree import Tree

__all__ = ["Published", "Tree", "dry_run", "push"]
