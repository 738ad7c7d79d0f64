"""The Vulkan backend on drivers that `make vulkan-drivers` unpacks: Mesa with cooperative matrices, under the
validation layer, and SwiftShader, which offers least. Each runs the common matrix in a process of its own.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from anyattn.backends.vulkan.pipeline import binaries, binary
from backends.vulkan.common import started

# of a module's preamble, SPIR-V specification 1.6, section 3.31
CAPABILITY = 17
SIXTEEN_OR_EIGHT_BITS = {9, 22, 39, 4433, 4434, 4435, 4436, 4448, 4449, 4450}
COOPERATIVE_MATRIX = 6022


def passed(driver: str, *tests: str, **variables: str) -> int:
    """Return the number of passed tests. No test may fail or be skipped."""
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    printed = started(driver, "-m", "pytest", *options, *tests, **variables)
    found = re.search(r"^(\d+) passed(, \d+ deselected)? in .*\s*\Z", printed, re.MULTILINE)
    assert found, printed[-2000:]
    return int(found[1])


def matrix(driver: str, cases: str, **variables: str) -> int:
    """Return the number of passed cases of the common matrix."""
    test = "tests/conformance/test_matrix.py::test_engine_equals_reference"
    return passed(driver, test, "-k", f"vulkan and not float64 and ({cases})", **variables)


def described(driver: str) -> dict[str, str]:
    """Return what `anyattn info` reports about its one device."""
    [device] = json.loads(started(driver, "-m", "anyattn", "info", "--json"))["vulkan"]["devices"]
    return device


def path_of_halves(driver: str) -> str:
    """Return the path of a float16 plan. It has no matrices if their self-test fails."""
    code = (
        "from harness.cases import named; from anyattn import testing; from anyattn.runtime import dispatch\n"
        "problem, _ = testing.make_inputs(named('huge_scores_f16')).describe()\n"
        "print(dispatch.get('vulkan').plan(problem).path)"
    )
    return started(driver, "-c", code).strip()


def test_mesa_driver_has_cooperative_matrices() -> None:
    found = described("mesa")
    assert "llvmpipe" in found["name"] and "cooperative matrices" in found["paths"]
    assert path_of_halves("mesa") == "cooperative matrices"


def test_swiftshader_has_the_lowest_supported_limits() -> None:
    found = described("swiftshader")
    assert "SwiftShader" in found["name"] and "subgroups of 4" in found["driver"]
    assert "cooperative matrices: the driver has no VK_KHR_cooperative_matrix" in found["off"]
    assert path_of_halves("swiftshader") == "scalar"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_matrix_of_cases_passes_on_mesa(direction: str) -> None:
    assert matrix("mesa", direction, ANYATTN_VULKAN_VALIDATE="1") > 150


def test_matrix_kernels_pass_on_mesa() -> None:
    assert passed("mesa", "tests/backends/vulkan/test_vulkan_matrices.py", ANYATTN_VULKAN_VALIDATE="1") >= 18


FUNCTIONS = "tests/backends/vulkan/test_vulkan_functions.py"
SAMPLE = "half or integers or decoding or stub or loops"  # of their tests


def test_score_functions_pass_on_mesa() -> None:
    """The float16 tests compute products by matrices. A child process, which one test starts, finds no driver."""
    assert passed("mesa", FUNCTIONS, "-k", "not validation", ANYATTN_VULKAN_VALIDATE="1") > 50


def test_score_functions_pass_on_swiftshader() -> None:
    assert passed("swiftshader", FUNCTIONS, "-k", SAMPLE) > 20


SMOKE = "plain or everything or decode_paged or varlen_seqused or bias_float32 or paged_odd_page_f16"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_matrix_of_cases_passes_on_swiftshader(direction: str) -> None:
    assert matrix("swiftshader", f"{direction} and ({SMOKE})") > 5


@pytest.mark.parametrize("name", sorted(binaries()))
def test_shaders_need_no_16_bit_types(name: str) -> None:
    """Check that only matrices need 16-bit types. Other shaders store 16-bit values as pairs in words."""
    words = np.frombuffer(binary(name), "<u4").tolist()
    capabilities, at = set(), 5
    while words[at] & 0xFFFF == CAPABILITY:
        capabilities.add(words[at + 1])
        at += words[at] >> 16
    assert capabilities
    if COOPERATIVE_MATRIX not in capabilities:
        assert not capabilities & SIXTEEN_OR_EIGHT_BITS
