"""What the README and the docstrings show runs, and the README's figures are those of the committed results."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

import anyattn
import anyattn.api
import anyattn.compat.aule
import anyattn.compat.flash_attention
import anyattn.compat.flash_attention_amd
import anyattn.compat.flash_attn.bert_padding
import anyattn.compat.flash_attn.layers.rotary
import anyattn.compat.flash_attn.ops.triton.rotary
import anyattn.compat.flash_attn_triton
import anyattn.compat.installation
import anyattn.compat.onnx
import anyattn.compat.torch
import anyattn.compat.xformers
import anyattn.dispatch
import anyattn.heads_first
import anyattn.native
import anyattn.nn
from anyattn.bench import markdown

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    "module",
    [
        anyattn,
        anyattn.api,
        anyattn.compat.aule,
        anyattn.compat.flash_attention,
        anyattn.compat.flash_attention_amd,
        anyattn.compat.flash_attn.bert_padding,
        anyattn.compat.flash_attn.layers.rotary,
        anyattn.compat.flash_attn.ops.triton.rotary,
        anyattn.compat.flash_attn_triton,
        anyattn.compat.installation,
        anyattn.compat.onnx,
        anyattn.compat.torch,
        anyattn.compat.xformers,
        anyattn.dispatch,
        anyattn.heads_first,
        anyattn.native,
        anyattn.nn,
    ],
    ids=lambda module: module.__name__,
)
def test_docstring_examples(module: object) -> None:
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)  # type: ignore[arg-type]
    assert tried > 0
    assert failed == 0


def test_every_public_name_is_documented() -> None:
    for name in anyattn.__all__:
        assert getattr(anyattn, name).__doc__, name


def test_readme_tables_are_the_committed_results() -> None:
    text = README.read_text()
    assert markdown.fill(text, json.loads(RESULTS.read_text())) == text
    assert "| float32 |" in text
