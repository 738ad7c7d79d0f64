"""Ctrl+C during a long call of the native library.

The library releases the GIL, so Python only notes that a signal came. In the main thread, the library takes the GIL
about every 20 ms of a long call and lets Python run the handlers. If one raises, the call ends and the exception is
raised here.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import Any, NoReturn


class _Python(ctypes.Structure):
    """The struct `anyattn_python` of anyattn.h."""

    _fields_ = (
        ("gil_ensure", ctypes.c_void_p),
        ("gil_release", ctypes.c_void_p),
        ("check_signals", ctypes.c_void_p),
        ("fetch", ctypes.c_void_p),
        ("thread_ident", ctypes.c_void_p),
        ("main_thread", ctypes.c_ulong),
        ("type", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("traceback", ctypes.c_void_p),
    )


_FUNCTIONS = (
    "PyGILState_Ensure",
    "PyGILState_Release",
    "PyErr_CheckSignals",
    "PyErr_Fetch",
    "PyThread_get_thread_ident",
)


def address_of(function: Any) -> int:
    """Return the address of a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def poll(poll_python: int) -> dict[str, float]:
    """Return the fields of a call that let signals interrupt it, or none where that is not possible.

    Args:
        poll_python: the address of `anyattn_poll_python`.
    """
    python = _python()
    return {} if python is None else {"poll": poll_python, "poll_user": ctypes.addressof(python)}


def raise_exception_of_handler() -> NoReturn:
    """Raise the exception that ended a call."""
    python = _python()
    if python is not None and python.type:
        taken = python.type, python.value, python.traceback
        python.type = python.value = python.traceback = None
        restore = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 3)(("PyErr_Restore", ctypes.pythonapi))
        restore(*taken)  # ctypes raises the exception that it finds after the call
    raise KeyboardInterrupt


@cache
def _python() -> _Python | None:
    """Return CPython's functions; None for another Python, and in a subinterpreter, which handles no signals."""
    try:
        api = ctypes.pythonapi
        interpreter = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyInterpreterState_Get", api))
        number = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(("PyInterpreterState_GetID", api))
        if number(interpreter()) != 0:
            return None
        python = _Python(*(address_of(getattr(api, name)) for name in _FUNCTIONS))
    except AttributeError:
        return None

    def note_main_thread() -> None:
        python.main_thread = threading.main_thread().ident or 0

    note_main_thread()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=note_main_thread)
    return python
