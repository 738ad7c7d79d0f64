"""Settings of anyattn: the public name of `anyattn.config.settings`."""

from .config.settings import VARIABLES, Settings, current, describe, on_reload, reload

__all__ = ["VARIABLES", "Settings", "current", "describe", "on_reload", "reload"]
