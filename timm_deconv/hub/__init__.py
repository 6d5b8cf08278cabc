"""Weights of this project: their entries in the zoo."""
