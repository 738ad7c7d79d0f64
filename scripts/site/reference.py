"""Reference with a page for every public name, which mkdocstrings writes from its docstring."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import anyattn

NAMES = tuple(f"anyattn.{name}" for name in anyattn.__all__)
# Modules that users import in addition to `anyattn` itself. A module without a list of names shows every public name.
MODULES = (
    "anyattn.nn",
    "anyattn.distributed",
    "anyattn.errors",
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
            *("torch", "flex_attention", "jax", "transformers", "diffusers", "xformers", "comfyui", "onnx"),
            *("aule", "flash_attention", "flash_attention_amd", "flash_attn_triton"),
        )
    ),
)


@cache
def pages() -> dict[str, str]:
    """Return the Markdown of each page, by its path."""
    return {f"reference/{file_name(name)}": page(name) for name in (*NAMES, *MODULES)}


def page(name: str) -> str:
    return f"---\ntitle: {name.removeprefix('anyattn.')}\n---\n\n::: {name}\n"


def index(link: Callable[[str], str]) -> str:
    """Return the tables of all names; `link` gives the target of a name."""
    tables = []
    for kind, names in (("Function or class", NAMES), ("Module", MODULES)):
        rows = (f"| [`{name}`]({link(name)}) | {summary(name)} |" for name in names)
        tables.append("\n".join([f"| {kind} | Summary |", "|---|---|", *rows]))
    return "\n\n".join(tables)


def source(name: str) -> str:
    """Return the file of the sources that documents a name, as a link from docs/reference."""
    if name in MODULES:
        spec = find_spec(name)
        assert spec is not None
        file = spec.origin
    else:
        file = inspect.getsourcefile(inspect.unwrap(getattr(anyattn, name.removeprefix("anyattn."))))
    assert file is not None
    return f"../../src/anyattn/{Path(file).relative_to(Path(anyattn.__file__).parent).as_posix()}"


def file_name(name: str) -> str:
    """Return the name of a page below reference/."""
    return f"{'modules/' if name in MODULES else ''}{name.removeprefix('anyattn.')}.md"


def summary(name: str) -> str:
    """Return the first paragraph of the docstring."""
    if name in MODULES:
        spec = find_spec(name)  # read instead of imported, because some modules need packages that the site does not
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    else:
        text = inspect.getdoc(getattr(anyattn, name.removeprefix("anyattn.")))
    assert text, f"{name} has no docstring"
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
