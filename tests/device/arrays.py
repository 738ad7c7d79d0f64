"""The matrix's cases as torch tensors on a device: the same values, strides and surroundings of NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

import anyattn
from anyattn import testing
from anyattn.definition.dtypes import FLOAT8
from anyattn.testing import Case, make_inputs

ARRAYS = ("q", "k", "v", "bias", "mask", "alibi_slopes", "sink", "rng_state")


def to_device(array: np.ndarray, device: str) -> torch.Tensor:
    """Copy a view with all memory of its owner. torch lacks negative strides and unaligned data: copy those."""
    if any(stride < 0 for stride in array.strides) or not array.flags.aligned:
        array = np.array(array, order="C")
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    if not owner.flags.c_contiguous:
        return _tensor(np.ascontiguousarray(array)).to(device)
    elements = owner.nbytes // array.itemsize
    flat = _tensor(owner.reshape(-1).view(np.uint8)[: elements * array.itemsize].view(array.dtype))
    steps = [stride // array.itemsize for stride in array.strides]
    return flat.to(device).as_strided(array.shape, steps, start // array.itemsize)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if array.dtype.name in FLOAT8:
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def to_numpy(array: torch.Tensor | None) -> np.ndarray | None:
    """bfloat16 as uint16."""
    if array is None:
        return None
    array = array.detach().cpu().contiguous()
    return array.view(torch.uint16).numpy() if array.dtype is torch.bfloat16 else array.numpy()


def compare(case: Case, device: str, backend: str = "triton") -> list[str]:
    """Return the errors of a case, forward and backward, or ["refused"] if the backend refuses it."""
    inputs = make_inputs(replace(case, layout="bshd") if case.layout == "reversed" else case)
    given: dict[str, Any] = {**inputs.arguments, "backend": backend}
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            given[name] = to_device(value, device)
        elif isinstance(value, list):
            given[name] = torch.tensor(value, dtype=torch.int32, device=device)
    try:
        out, lse = anyattn.attention_forward(**given)
        wrong = testing.compare(testing.expected(inputs), {"out": to_numpy(out), "lse": to_numpy(lse)})
        if case.lengths.startswith("paged"):
            return wrong
        dout = to_device(inputs.dout, device)
        dlse = None if inputs.dlse is None else to_device(inputs.dlse, device)
        grads = anyattn.attention_backward(dout, out=out, lse=lse, dlse=dlse, **given)
    except anyattn.UnsupportedProblem:
        return ["refused"]
    got = {name: to_numpy(gradient) for name, gradient in grads._asdict().items()}
    if got["dbias"] is not None:
        got["dbias"] = got["dbias"].reshape((1,) * (4 - got["dbias"].ndim) + got["dbias"].shape)
    return wrong + testing.compare(testing.expected(inputs, "backward"), got)
