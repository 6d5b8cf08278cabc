"""Stands beside the script and is imported by it."""

NAME = "neighbour"
