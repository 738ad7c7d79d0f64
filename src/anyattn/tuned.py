"""Tuned values in the user's cache folder: the former name of `anyattn.config.tuning_files`."""

from .config.tuning_files import load, path, save

__all__ = ["load", "path", "save"]
