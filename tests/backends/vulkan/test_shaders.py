"""The committed SPIR-V: it is what the sources say, and freezing leaves nothing open. Needs no device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from anyattn.backends.vulkan import spirv, tuning
from anyattn.backends.vulkan.backend import VulkanBackend
from anyattn.backends.vulkan.matrices import Shape
from anyattn.backends.vulkan.pipeline import LIBRARY, binaries, binary
from harness.paths import SCRIPTS

SCRIPT = SCRIPTS / "make_shaders.py"
NAMES = sorted(binaries().keys() - {LIBRARY})
CONSTANTS = {0: 64, 1: 16, 2: 8, 3: 2, 4: 2, 5: 32, 6: 31, 7: 1, 8: 8, 9: 16, 10: 16, 11: 32}
WORKGROUP = 4  # storage class of shared memory
OPEN = (spirv.SPEC_TRUE, spirv.SPEC_FALSE, spirv.SPEC_CONSTANT, spirv.SPEC_COMPOSITE, spirv.SPEC_OP)


def instructions(module: bytes) -> Iterator[list[int]]:
    words = np.frombuffer(module, "<u4").tolist()
    at = spirv.HEADER
    while at < len(words):
        length = words[at] >> 16
        yield words[at : at + length]
        at += length


def test_binaries_match_their_sources() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(NAMES) > 20


def test_a_python_without_lzma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert "needs Python's module lzma" in str(VulkanBackend().available(named=True))


@pytest.mark.parametrize("name", NAMES)
def test_specialization_replaces_constants_by_numbers(name: str) -> None:
    frozen = list(instructions(spirv.freeze(binary(name), CONSTANTS)))
    assert not [word for word in frozen if word[0] & 0xFFFF in OPEN]
    assert any(word[0] & 0xFFFF in OPEN for word in instructions(binary(name)))
    modes = [word for word in frozen if word[0] & 0xFFFF == spirv.EXECUTION_MODE and word[2] == spirv.LOCAL_SIZE]
    assert [word[3:] for word in modes] == [[64, 1, 1]]


@pytest.mark.parametrize("unroll", [False, True])
def test_loop_hints_follow_the_unroll_option(unroll: bool) -> None:
    frozen = instructions(spirv.freeze(binary("forward_f32"), {}, unroll=unroll))
    hints = [word[3] for word in frozen if word[0] & 0xFFFF == spirv.LOOP_MERGE]
    assert (spirv.DONT_UNROLL in hints) is not unroll


def shared_bytes(module: bytes) -> int:
    """Return the bytes of shared memory that a specialized module declares."""
    sizes: dict[int, int] = {}
    pointers: dict[int, int] = {}
    values: dict[int, int] = {}
    total = 0
    for word in instructions(module):
        op = word[0] & 0xFFFF
        if op in (21, 22):  # integers and floating-point numbers
            sizes[word[1]] = word[2] // 8
        elif op == spirv.TYPE_BOOL:
            sizes[word[1]] = 4
        elif op == 23:  # vectors
            sizes[word[1]] = sizes[word[2]] * word[3]
        elif op == 28 and word[2] in sizes:  # arrays
            sizes[word[1]] = sizes[word[2]] * values[word[3]]
        elif op == 30:  # structures
            sizes[word[1]] = sum(sizes.get(member, 0) for member in word[2:])
        elif op == 32 and word[2] == WORKGROUP:
            pointers[word[1]] = word[3]
        elif op == spirv.CONSTANT:
            values[word[2]] = word[3]
        elif op == 59 and word[3] == WORKGROUP:  # variables
            total += sizes[pointers[word[1]]]
    return total


@pytest.mark.parametrize("shader", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("size", [(32, 8, 1, 1, 32), (128, 32, 2, 1, 32), (64, 64, 4, 2, 16)], ids=str)
def test_shared_memory_stays_below_the_estimate(shader: str, size: tuple[int, ...]) -> None:
    workgroup, dim, lanes, rows, keys = size
    shape = Shape(16, 16, 16, "float16")
    config = tuning.Config(workgroup, dim, 8, lanes, rows, keys, 0, "float16", False, False, shape, 32)
    declared = shared_bytes(spirv.freeze(binary(config.module(shader)), config.constants()))
    reckoned = tuning.shared_bytes(config, shader)
    assert declared <= reckoned <= declared + 40 * keys
