"""The committed SPIR-V: it is what the sources say, and freezing leaves nothing open. Needs no device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anyattn.backends.vulkan import spirv
from anyattn.backends.vulkan.pipeline import BINARIES, binary

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_shaders.py"
NAMES = sorted(path.stem for path in BINARIES.glob("*.spv"))
CONSTANTS = {0: 64, 1: 16, 2: 8, 3: 2, 4: 2, 5: 32, 6: 31, 7: 1, 8: 8, 9: 16, 10: 16, 11: 32}
OPEN = (spirv.SPEC_TRUE, spirv.SPEC_FALSE, spirv.SPEC_CONSTANT, spirv.SPEC_COMPOSITE, spirv.SPEC_OP)


def instructions(module: bytes) -> Iterator[list[int]]:
    words = np.frombuffer(module, "<u4").tolist()
    at = spirv.HEADER
    while at < len(words):
        length = words[at] >> 16
        yield words[at : at + length]
        at += length


def test_binaries_are_those_of_the_sources() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_frozen_modules_have_plain_numbers(name: str) -> None:
    frozen = list(instructions(spirv.freeze(binary(name), CONSTANTS)))
    assert not [word for word in frozen if word[0] & 0xFFFF in OPEN]
    assert any(word[0] & 0xFFFF in OPEN for word in instructions(binary(name)))
    modes = [word for word in frozen if word[0] & 0xFFFF == spirv.EXECUTION_MODE and word[2] == spirv.LOCAL_SIZE]
    assert [word[3:] for word in modes] == [[64, 1, 1]]


@pytest.mark.parametrize("unroll", [False, True])
def test_hints_of_loops_turn_around(unroll: bool) -> None:
    frozen = instructions(spirv.freeze(binary("forward_f32"), {}, unroll=unroll))
    hints = [word[3] for word in frozen if word[0] & 0xFFFF == spirv.LOOP_MERGE]
    assert (spirv.DONT_UNROLL in hints) is not unroll
