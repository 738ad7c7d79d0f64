"""`anyattn info`: features of this installation, and reasons for missing ones.

A part that fails does not stop the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__, capabilities
from ..config import settings
from ..config.machine import processor
from ..definition.dtypes import ATTENTION_DTYPES
from ..runtime import dispatch
from .table import table

# The library's reason for targets after the one that computes a dtype.
AFTER = "a target before it computes this dtype"
PACKAGES = ("numpy", "torch", "ml_dtypes", "triton")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "info",
        help="show backends, instruction sets, threads, versions and settings",
        description="Shows which backends this machine has, and why others are missing, the instruction set of each "
        "dtype, threads, versions and active settings. A bug report needs the output of `anyattn info --json`.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--features",
        action="store_true",
        help="show a table of the features that each backend supports",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the information; return 1 if a backend that the settings require is not available, even by name."""
    if arguments.features:
        print(features_text(capabilities.collect()))
        return 0
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else text(found))
    missing = [name for name in found["required"] if not found["backends"].get(name, {}).get("named")]
    if missing:
        sys.stderr.write(f"{settings.VARIABLES['require'][0]} must name available backends, got {', '.join(missing)}\n")
    return 1 if missing else 0


def collect() -> dict[str, Any]:
    """Return the information, JSON-ready. A part that fails is {"error": text}."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": {name: _try(partial(_backend, name)) for name in dispatch.names()},
        "required": _required(),
        "cpu": _try(_cpu),
        "vulkan": _try(_vulkan),
        "settings": _try(_settings),
    }


def features_text(found: list[capabilities.Feature]) -> str:
    """Return the table of features, followed by the reasons."""
    notes = [f"[{number}] {reason}" for reason, number in capabilities.footnotes(found).items()]
    return "\n".join([table(*capabilities.cells(found), left=True), "", *notes])


def text(found: dict[str, Any]) -> str:
    lines = [
        f"anyattn {found['version']}, Python {found['python']}, {found['platform']}",
        f"{found['processor']}, {found['cores']} cores",
        ", ".join(f"{name} {number or 'not installed'}" for name, number in found["packages"].items()),
        "",
    ]
    for name, backend in found["backends"].items():
        reason = backend.get("error") or backend.get("reason")
        only = "only if named" if backend.get("named") else "not available"
        lines.append(f"backend {name}: {f'{only}: {reason}' if reason else 'available'}")
        lines += [f"  {how:19} {'; '.join(where)}" for how, where in backend.get("evidence", {}).items()]
        lines += ["  {device:19} {name}, {arch}: {state}".format(**card) for card in backend.get("devices", [])]
        lines += [f"  kernels for Hopper  {backend['hopper']}"] if "hopper" in backend else []
    cpu = found["cpu"]
    if "error" in cpu:
        lines += ["", f"CPU engine: {cpu['error']}"]
    else:
        lines += [
            "",
            "CPU engine",
            f"  library             {cpu['library']}",
            f"  instruction sets    {', '.join(cpu['targets'])}",
            f"  threads             {cpu['num_threads']} ({cpu['thread_runtime']})",
            *_targets_text(cpu["dtypes"]),
        ]
    lines += ["", *_vulkan_text(found["vulkan"])]
    options = found["settings"]
    if "error" in options:
        return "\n".join([*lines, "", f"settings: {options['error']}"])
    rows = [(name, entry["value"] or "-", entry["meaning"]) for name, entry in options.items()]
    return "\n".join([*lines, "", table(("setting", "value", "meaning"), rows, left=True)])


def _version(name: str) -> str | None:
    """Return the version from the package's metadata, without importing the package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _try(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _backend(name: str) -> dict[str, Any]:
    backend = dispatch.get(name)
    reason, missing = backend.available(), backend.available(named=True)
    found: dict[str, Any] = {
        "available": reason is None,
        "named": missing is None,
        "reason": missing or reason,
        "evidence": capabilities.evidence(name),
    }
    if name == "triton":
        from ..backends.triton import sm90
        from ..backends.triton.backend import list_gpus

        found["devices"] = [] if reason else list_gpus()
        found["hopper"] = sm90.reason_off() or "on"
    return found


def _required() -> tuple[str, ...]:
    try:
        return settings.current().require
    except ValueError:  # reported under "settings"
        return ()


def _cpu() -> dict[str, Any]:
    from ..backends.cpu import library

    native = library.load()
    return {
        "library": str(native.path),
        "targets": native.targets(),
        "dtypes": {
            dtype: {"target": native.target(dtype), "reasons": native.target_reasons(dtype)}
            for dtype in ATTENTION_DTYPES
        },
        "num_threads": native.num_threads(),
        "thread_runtime": native.thread_runtime(),
    }


def _targets_text(dtypes: dict[str, Any]) -> list[str]:
    """Name the instruction set of each dtype, and why no earlier one of the list computes it."""
    lines = []
    for dtype, found in dtypes.items():
        passed_over = [f"{name}: {reason}" for name, reason in found["reasons"].items() if reason != AFTER]
        lines.append(f"  {dtype:19} {found['target']}{''.join(f'; {text}' for text in passed_over)}")
    return lines


def _vulkan() -> dict[str, Any]:
    from ..backends.vulkan import device, offload

    instance = device.instance()
    chosen = instance.choose().index
    return {
        "devices": [
            {**info.describe(), "automatic": offload.describe(info), "chosen": info.index == chosen}
            for info in instance.devices
        ]
    }


def _vulkan_text(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"Vulkan: {found['error']}"]
    lines = []
    for device in found["devices"]:
        chosen = " (active)" if device["chosen"] else ""
        lines.append(f"Vulkan device {device['index']}: {device['name']}, {device['kind']}{chosen}")
        shown = ("driver", "memory", "paths", "off", "automatic")
        lines += [f"  {name:19} {device[name]}" for name in shown if device[name]]
    return lines


def _settings() -> dict[str, Any]:
    dispatch.check_settings()
    return {name: {"value": value, "meaning": meaning} for name, (value, meaning) in settings.describe().items()}
