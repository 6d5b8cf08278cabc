"""Training: recipes, tasks, the loop, checkpoints, result rows."""

from .recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
