"""The struct that Python packs is the struct that the header declares: every field, its type and its offset."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

import anyattn
from anyattn.backends.cpu import layout, library
from anyattn.runtime import dispatch
from harness.paths import ROOT

HEADERS = [
    ROOT / "native/include/anyattn.h",
    *(Path(folder) / "include/anyattn.h" for folder in anyattn.__path__),
]
CTYPES = {
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "anyattn_parallel_for": ctypes.c_void_p,
    "anyattn_poll": ctypes.c_void_p,
}
KINDS = {
    ctypes.c_uint32: "I",
    ctypes.c_int32: "i",
    ctypes.c_int64: "q",
    ctypes.c_double: "d",
    ctypes.c_void_p: layout.POINTER,
}


def declared(name: str) -> list[tuple[str, type]]:
    """(field, ctypes type) of a struct of the header, an array or a nested struct taken apart."""
    header = next(path for path in HEADERS if path.exists()).read_text(encoding="utf-8")
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", header, re.DOTALL)
    assert body, f"the header has no struct {name}"
    text = re.sub(r"/\*.*?\*/", "", body.group(1), flags=re.DOTALL)
    fields = []
    for declaration in filter(None, (line.strip() for line in text.split(";"))):
        kind, names = re.sub(r"\bconst\b", "", declaration).split(maxsplit=1)
        for field in (part.strip() for part in names.split(",")):
            fields += expand(kind, field)
    return fields


def expand(kind: str, field: str) -> list[tuple[str, type]]:
    if field.startswith("*"):
        return [(field[1:], ctypes.c_void_p)]
    if kind == "anyattn_array":
        return [(f"{field}.{part}", part_kind) for part, part_kind in declared("anyattn_array")]
    counted = re.fullmatch(r"(\w+)\[(\d+)\]", field)
    if counted:
        return [(f"{counted.group(1)}{index}", CTYPES[kind]) for index in range(int(counted.group(2)))]
    return [(field, CTYPES[kind])]


def test_fields_and_offsets_equal_those_of_the_header() -> None:
    fields = declared("anyattn_call")
    assert [(name, KINDS[kind]) for name, kind in fields] == list(layout.FIELDS)
    struct = type("Call", (ctypes.Structure,), {"_fields_": fields})
    assert ctypes.sizeof(struct) == layout.SIZE
    assert {name: getattr(struct, name).offset for name, _ in fields} == {
        name: layout.offset(name) for name, _ in layout.FIELDS
    }


def test_values_reach_their_fields() -> None:
    fields = declared("anyattn_call")
    values = {name: index + 1 for index, (name, _) in enumerate(fields)}
    struct = type("Call", (ctypes.Structure,), {"_fields_": fields})
    packed = struct.from_buffer_copy(layout.pack(values))
    assert {name: getattr(packed, name) for name, _ in fields} == values


def test_library_reports_the_same_layout() -> None:
    missing = dispatch.get("cpu").available()
    if missing:
        pytest.skip(missing)
    assert library.load().call_size() == layout.SIZE
