"""OpenVINO's ScaledDotProductAttention, in float32, and in bfloat16 by its precision hint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..inputs import Inputs
from .base import LIMIT_BYTES, Prepared, Refused, installed, refuse

if TYPE_CHECKING:
    from torch import Tensor

HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino:
    """Provider of OpenVINO. Inputs and results are stored as float32 with the hint too, as its users have them."""

    name = "OpenVINO"
    package = "openvino"

    def absent(self) -> str | None:
        return installed("openvino")

    def prepare(self, inputs: Inputs, threads: int) -> Prepared:
        workload = inputs.workload
        refuse(
            workload,
            backward=workload.backward,
            packed_sequences=workload.packed,
            pages=workload.page_size,
            grouped_heads=workload.group > 1,
            dropout=workload.dropout_p,
            softcap=workload.softcap,
            sink=workload.sink,
            **{workload.dtype: workload.dtype not in HINTS},
        )
        import torch

        request, tensors = _request(inputs, threads)

        def run() -> Any:
            assert tensors  # the request reads this memory without a reference to it
            request.infer()
            return request

        def results(done: Any) -> list[Tensor]:
            return [torch.from_numpy(done.get_output_tensor().data).transpose(1, 2)]

        return Prepared(run, results)


def _request(inputs: Inputs, threads: int) -> tuple[Any, list[Any]]:
    """Return an inference request, and the tensors whose memory it reads."""
    import openvino
    from openvino import opset13

    workload = inputs.workload
    arrays = {name: inputs.heads_first(name).float().numpy() for name in ("q", "k", "v")}
    causal = (
        workload.causal
        and workload.window is None
        and workload.seqlen_q == workload.seqlen_k
        and not (workload.bias or workload.mask)
    )
    if workload.alibi or not causal:
        mask = _mask(inputs)
        causal = False
        if mask is not None:
            arrays["mask"] = mask
    parameters = [opset13.parameter(x.shape, x.dtype, name=name) for name, x in arrays.items()]
    node = opset13.scaled_dot_product_attention(*parameters, causal=causal)
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": HINTS[workload.dtype],
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters, "attention"), "CPU", properties)
    request = compiled.create_infer_request()
    tensors = [openvino.Tensor(x, shared_memory=True) for x in arrays.values()]
    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, tensor)
    return request, [*tensors, *arrays.values()]


def _mask(inputs: Inputs) -> Any:
    """Return a float32 mask (1, nheads or 1, seqlen_q, seqlen_k), or None."""
    workload = inputs.workload
    additive, visible = inputs.additive, inputs.visible
    if additive is None and visible is None:
        return None
    size = (1, 1 if additive is None else additive.shape[1], workload.seqlen_q, workload.seqlen_k)
    if 4 * np.prod(size) > LIMIT_BYTES:
        raise Refused(f"its mask would take {4 * np.prod(size) / 2**30:.1f} GiB")
    mask = np.zeros(size, np.float32) if additive is None else additive.float().expand(size).numpy()
    return np.ascontiguousarray(mask if visible is None else np.where(visible.numpy(), mask, np.float32(-np.inf)))
