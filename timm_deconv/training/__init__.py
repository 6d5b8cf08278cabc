"""Training: recipes, tasks, the loop, checkpoints, result rows."""

from timm_deconv.training.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
