"""Weights of this project and of users: their entries in the zoo, and how they are published."""
