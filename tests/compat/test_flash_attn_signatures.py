"""The names, signatures and constants that programs written for flash_attn 2, 3 and 4 find."""

from __future__ import annotations

import doctest
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from anyattn.compat import flash_attn, flash_attn_3, flash_attn_4
from anyattn.compat.flash_attn import _kvcache, _ops, _private, _varlen, flash_attn_interface
from anyattn.compat.flash_attn_3 import _with_kvcache
from anyattn.compat.flash_attn_3 import flash_attn_interface as flash_attn_interface_3
from anyattn.compat.flash_attn_4 import interface
from compat.signatures import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4
from harness.processes import fresh

RECORDED = [
    (module, name, text)
    for module, table in (
        (flash_attn_interface, FLASH_ATTN_2),
        (flash_attn_interface_3, FLASH_ATTN_3),
        (interface, FLASH_ATTN_4),
    )
    for name, text in table.items()
]


def shape(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
    return [(x.name, x.kind, x.default) for x in signature.parameters.values()]


@pytest.mark.parametrize(
    "module, name, text", RECORDED, ids=[f"{module.__name__}.{name}" for module, name, _ in RECORDED]
)
def test_signature_equals_that_of_upstream(module: ModuleType, name: str, text: str) -> None:
    want = eval(f"lambda {text}: None", {"torch": torch})
    function = getattr(module, name)
    assert shape(inspect.signature(function)) == shape(inspect.signature(want))
    assert not hasattr(function, "__wrapped__")


@pytest.mark.parametrize(
    "package, table", [(flash_attn, FLASH_ATTN_2), (flash_attn_3, FLASH_ATTN_3), (flash_attn_4, FLASH_ATTN_4)]
)
def test_packages_export_the_public_functions(package: ModuleType, table: dict[str, str]) -> None:
    public = {name for name in table if name.startswith(("flash_attn", "get_scheduler")) and "unpadded" not in name}
    assert set(package.__all__) == public
    for name in public:
        assert getattr(package, name).__doc__


@pytest.mark.parametrize(
    "module", [flash_attn_interface, _private, _varlen, _kvcache, flash_attn_interface_3, _with_kvcache, interface]
)
def test_docstring_examples_run(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0


def test_import_prints_nothing_and_loads_neither_dynamo_nor_the_real_package() -> None:
    result = fresh(
        "import sys, anyattn.compat.flash_attn, anyattn.compat.flash_attn_3, anyattn.compat.flash_attn_4\n"
        "assert 'torch._dynamo' not in sys.modules and 'flash_attn' not in sys.modules"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_constants_and_autograd_classes_exist() -> None:
    assert flash_attn_interface.USE_TRITON_ROCM is False
    assert tuple(int(part) for part in flash_attn.__version__.split(".")) >= (2, 8, 0)
    for kind in ("", "KVPacked", "QKVPacked", "Varlen", "VarlenKVPacked", "VarlenQKVPacked"):
        assert callable(getattr(flash_attn_interface, f"FlashAttn{kind}Func").apply)


def test_helper_functions_return_the_values_of_upstream() -> None:
    x = torch.zeros(2, 3)
    assert flash_attn_interface.maybe_contiguous(x) is x
    assert flash_attn_interface.maybe_contiguous(None) is None
    assert flash_attn_interface.maybe_contiguous(x.T).is_contiguous()
    assert [flash_attn_interface.round_multiple(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert flash_attn_interface._get_block_size_n("cpu", 64, True, True) > 2**24  # one maximum for a whole row


def test_operators_have_the_real_package_s_names() -> None:
    assert not _ops.real_package()
    for name in ("forward", "varlen_forward", "backward", "varlen_backward"):
        names = [
            argument.name for argument in getattr(torch.ops.flash_attn, f"_flash_attn_{name}").default._schema.arguments
        ]
        assert names == list(inspect.signature(getattr(flash_attn_interface, f"_flash_attn_{name}")).parameters)


def test_operators_of_an_installed_real_package_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert _ops.real_package()
