"""Dry run of docs/contribute/add-a-feature.md: one more row in the table of inputs is all that the library needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyattn

PACKAGE = Path(anyattn.__file__).parent
FIELD = '"key_bias": Field(HEADS, (("nheads",),), ("compute",), gradient=True),'

CALLS = """
import numpy as np, torch, anyattn
q, bias = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(2)
sink = torch.randn(2, requires_grad=True)
compiled = torch.compile(lambda q, sink: anyattn.attention(q, q, q, sink=sink), fullgraph=True, backend="aot_eager")
for call in (lambda q, sink: anyattn.attention(q, q, q, sink=sink), compiled):
    q.grad = sink.grad = None
    call(q, sink).sum().backward()
    assert q.grad.shape == q.shape and sink.grad.shape == (2,)
assert torch.vmap(lambda q: anyattn.attention(q, q, q))(torch.randn(3, 2, 5, 2, 8)).shape == (3, 2, 5, 2, 8)

schema = str(torch.ops.anyattn.backward.default._schema)
assert all(part in schema for part in ("Tensor? key_bias=None", "bool want_dkey_bias=True", "Tensor dkey_bias")), schema
for x, given in ((q.detach(), bias), (q.detach().numpy(), bias.numpy())):
    explanation = anyattn.explain(x, x, x, key_bias=given)
    assert explanation.chosen is None and explanation.reasons["cpu"] == ["does not support key_bias"], explanation
    try:
        anyattn.attention_forward(x, x, x, key_bias=given, backend="numpy")
    except anyattn.UnsupportedProblem as error:
        assert "numpy: does not support key_bias" in str(error)
    else:
        raise AssertionError("key_bias was ignored")
    try:
        anyattn.attention_forward(x, x, x, key_bias=given[:1])
    except ValueError as error:
        assert "key_bias must have shape (nheads,) = (2,), got (1,)" in str(error)
    else:
        raise AssertionError("key_bias of a wrong shape passed")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package that has one optional input more."""
    shutil.copytree(PACKAGE, tmp_path / "anyattn", ignore=shutil.ignore_patterns("examples", "__pycache__"))
    insert(tmp_path / "anyattn/definition/inputs.py", "    rng_state: Any = None\n", "    key_bias: Any = None\n")
    insert(tmp_path / "anyattn/definition/inputs.py", "    dsink: Any = None\n", "    dkey_bias: Any = None\n")
    insert(tmp_path / "anyattn/definition/inputs.py", 'note="seed and offset"),\n', f"    {FIELD}\n")
    keywords = "class ExplicitArguments(DenseArguments, total=False):\n"
    insert(tmp_path / "anyattn/keywords.py", keywords, "    key_bias: Array | None\n")
    return tmp_path


def insert(path: Path, after: str, line: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(after) == 1, after
    path.write_text(text.replace(after, after + line), encoding="utf-8")


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANYATTN_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=1800, cwd=package,
        env=environment | {"PYTHONPATH": str(package)},
    )  # fmt: skip


def test_a_row_adds_an_input_everywhere_and_no_backend_ignores_it(package: Path) -> None:
    result = run(package, "-c", CALLS)
    assert result.returncode == 0, result.stderr


def test_a_row_adds_a_flag_of_explain(package: Path) -> None:
    result = run(package, "-m", "anyattn", "explain", "--key-bias")
    assert result.returncode == 1 and "not numpy: does not support key_bias" in result.stdout, (
        result.stdout + result.stderr
    )
