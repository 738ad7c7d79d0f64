"""NumPy backend: tiled attention in O(N) memory on any machine, and an executable explanation of the algorithm."""

from .backend import NumpyBackend

__all__ = ["NumpyBackend"]
