"""Number of threads of the CPU engine, adjustable at run time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MOST = 4096


def get_num_threads() -> int:
    """Return the number of threads that the next call of the CPU backend may use.

    Without `set_num_threads` and ANYATTN_NUM_THREADS this is the number of the OpenMP runtime that PyTorch uses, or one
    per processor without PyTorch, and never more than the process's affinity mask and control group grant.

    Raises:
        RuntimeError: the native library is not available; NumPy's BLAS decides on the threads of the NumPy backend.

    >>> import anyattn
    >>> anyattn.get_num_threads() >= 1
    True
    """
    from .backends.cpu import library

    return library.load().num_threads()


def set_num_threads(num_threads: int) -> None:
    """Choose the number of threads of later calls of the CPU backend, in every thread of the process.

    Results do not depend on it, bit for bit.

    Args:
        num_threads: 1 to 4096; 0: follow the OpenMP runtime, the affinity mask and the control group again.

    Raises:
        TypeError, ValueError: num_threads is not such an integer.
        RuntimeError: the native library is not available.

    >>> import anyattn
    >>> anyattn.set_num_threads(1)
    >>> anyattn.get_num_threads()
    1
    >>> anyattn.set_num_threads(0)
    """
    from .backends.cpu import library

    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise TypeError(f"num_threads must be an integer, got {num_threads!r}.")
    count = num_threads.__index__()
    if not 0 <= count <= MOST:
        raise ValueError(f"num_threads must be from 0 to {MOST}, got {count}.")
    library.load().set_num_threads(count)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Use this number of threads inside the `with` block, in every thread of the process.

    >>> import anyattn
    >>> with anyattn.num_threads(1):
    ...     anyattn.get_num_threads()
    1
    """
    from .backends.cpu import library

    native = library.load()
    before = native.num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        native.restore_num_threads(before)
