"""Tuned values in the user's cache folder: the name that `anyattn.config.tuning_files` had before."""

from .config.tuning_files import load, path, save

__all__ = ["load", "path", "save"]
