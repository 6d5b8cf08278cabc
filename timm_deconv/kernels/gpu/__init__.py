"""Triton kernels behind the seam, for CUDA devices.

Each module has the kernels of one operation and, under the operation's name, the function that launches them. It takes
the operation's arguments and raises `Unfit` before it has written anything where they are not for it; then, and where
Triton cannot work, the plain form runs. Nothing is imported before a tensor on a GPU asks for it.
"""
