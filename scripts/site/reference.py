"""The reference: a page for every public name, written by mkdocstrings from its docstring."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import anyattn

NAMES = tuple(f"anyattn.{name}" for name in anyattn.__all__)
# Modules that users import beside `anyattn` itself. Those without a list of names show every public one.
MODULES = (
    "anyattn.nn",
    "anyattn.settings",
    "anyattn.keywords",
    "anyattn.testing",
    "anyattn.vulkan",
    "anyattn.compat",
    *(
        f"anyattn.compat.{name}"
        for name in (
            *("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "flash_attn.layers.rotary"),
            *("flash_attn.modules.mha", "flash_attn.ops.triton.rotary"),
            *("flash_attn_3", "flash_attn_3.flash_attn_interface", "flash_attn_4", "flash_attn_4.interface"),
            "flash_attn_4.block_sparsity",
            *("torch", "transformers", "diffusers", "xformers", "comfyui", "onnx"),
            *("aule", "flash_attention", "flash_attention_amd", "flash_attn_triton"),
        )
    ),
)
INDEX = """# Reference

Every public name. C and C++ have [their own page](c-and-cpp.md).

## Functions and classes
{names}

## Modules
{modules}
"""


@cache
def pages() -> dict[str, str]:
    """Path -> Markdown."""
    found = {f"reference/{file_name(name)}": page(name) for name in (*NAMES, *MODULES)}
    return found | {"reference/index.md": INDEX.format(names=table(NAMES), modules=table(MODULES))}


def page(name: str) -> str:
    return f"---\ntitle: {name.removeprefix('anyattn.')}\n---\n\n::: {name}\n"


def table(names: tuple[str, ...]) -> str:
    rows = (f"| [`{name}`]({file_name(name)}) | {summary(name)} |" for name in names)
    return "\n".join(["| Name | What it is |", "|---|---|", *rows])


def file_name(name: str) -> str:
    """Below reference/."""
    return f"{'modules/' if name in MODULES else ''}{name.removeprefix('anyattn.')}.md"


def summary(name: str) -> str:
    """The first paragraph of the docstring."""
    if name in MODULES:
        spec = find_spec(name)  # read, not imported: some need packages that the site does not
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    else:
        text = inspect.getdoc(getattr(anyattn, name.removeprefix("anyattn.")))
    assert text, f"{name} has no docstring"
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
