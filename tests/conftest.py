"""Fixtures: every backend; results that start as NaN, between guards; hypothesis profiles.

Each worker of pytest-xdist computes alone, so NumPy's matrix products take one thread.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Triton's kernels run here in its interpreter; it reads this when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("ANYATTN_VULKAN_SOFTWARE", "1")
# no folder: no measurement of this machine decides what is tested, and no file remains
os.environ["ANYATTN_CACHE"] = f"{os.devnull}/anyattn"

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A failed assertion of a helper shows its values, as one of a test does.
pytest.register_assert_rewrite("harness", "backends", "compat", "device", "soak", "stress")

from anyattn.config import settings as anyattn_settings  # noqa: E402
from anyattn.frameworks.numpy import NumpyAdapter  # noqa: E402
from harness import selection  # noqa: E402
from harness.backends import Engine  # noqa: E402
from harness.memory import Memory, guarded_empty  # noqa: E402

# Nothing here may depend on time or on what ran before: no deadline, and the same examples every time.
settings.register_profile(
    "default", max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("full", settings.get_profile("default"), max_examples=2000)
settings.load_profile("default")

# transformers, and packages that need it, no longer support Python 3.10 (requirements/test.txt).
RECENT = [
    "compat/test_diffusion.py",
    "compat/test_onnx.py",
    "compat/test_smollm2.py",
    "compat/test_transformers.py",
    "compat/test_transformers_models.py",
    "tools/test_model_sweep.py",
]
collect_ignore = RECENT if sys.version_info < (3, 11) else []

THREADS = 3  # more than tasks of small problems, and not a power of two


@pytest.fixture(scope="session")
def _memory() -> Iterator[Memory]:
    memory = Memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NumpyAdapter, "empty", guarded_empty(memory))
        yield memory


@pytest.fixture(autouse=True)
def _guarded(_memory: Memory) -> Iterator[None]:
    yield
    _memory.check()


@pytest.fixture(autouse=True, scope="module")
def _programs_of_jax() -> Iterator[None]:
    """Free the programs that JAX compiled for the tests of a module. Together they would take gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check", action="store_true", help="small cases on NumPy and the CPU alone: make check")


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    selection.parametrize(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selection.select(config, items)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Engine:
    """Return a backend of this machine whose settings are active: see harness/selection.py."""
    engine: Engine = request.param
    engine.use(THREADS)
    return engine


@pytest.fixture
def nothing_required() -> Iterator[None]:
    """A test that takes a backend away: ANYATTN_REQUIRE would raise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ANYATTN_REQUIRE", raising=False)
        anyattn_settings.reload()
        yield
    anyattn_settings.reload()
