"""ONNX Runtime's fused attention: com.microsoft MultiHeadAttention, and GroupQueryAttention for grouped heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..inputs import Inputs
from ..workloads import Workload
from .base import Prepared, Refused, installed, refuse

if TYPE_CHECKING:
    from torch import Tensor


class OnnxRuntime:
    name = "ONNX Runtime"
    package = "onnxruntime"

    def absent(self) -> str | None:
        return installed("onnxruntime", "onnx")

    def prepare(self, inputs: Inputs, threads: int) -> Prepared:
        workload = inputs.workload
        refuse(
            workload,
            backward=workload.backward,
            packed_sequences=workload.packed,
            pages=workload.page_size,
            dropout=workload.dropout_p,
            sink_here=workload.sink,
            **{f"{workload.dtype} kernel": workload.dtype != "float32"},
        )
        if workload.group > 1:
            return _decode(inputs, threads) if workload.seqlen_q == 1 else _grouped(inputs, threads)
        return _multi_head(inputs, threads)


def _multi_head(inputs: Inputs, threads: int) -> Prepared:
    workload = inputs.workload
    refuse(workload, window=workload.window, softcap=workload.softcap)
    if workload.causal and workload.seqlen_q not in (1, workload.seqlen_k):
        raise Refused("no causal mask aligned to the last key")
    feeds = {name: _flat(inputs, name) for name in ("q", "k", "v")}
    names = ["q", "k", "v"]
    hidden = inputs.mask
    if inputs.additive is not None or hidden is not None:
        size = (1, workload.nheads, workload.seqlen_q, workload.seqlen_k)
        bias = np.zeros(size, np.float32) if inputs.additive is None else inputs.additive.expand(size).numpy()
        feeds["bias"] = np.ascontiguousarray(bias if hidden is None else np.where(hidden.numpy(), bias, -np.inf))
        names = ["q", "k", "v", "", "", "bias"]
    causal = int(workload.causal and workload.seqlen_q == workload.seqlen_k)
    attributes = {"num_heads": workload.nheads, "unidirectional": causal}
    session = _session("MultiHeadAttention", names, feeds, ["o"], attributes, threads)
    return Prepared(lambda: session.run(None, feeds), lambda returned: _unflat(workload, returned[0]))


def _grouped(inputs: Inputs, threads: int) -> Prepared:
    """Prepare a prefill. The operator is causal and has no bidirectional form."""
    workload = inputs.workload
    left, right = workload.window or (None, None)
    if not workload.causal and right != 0:
        raise Refused("grouped heads only with a causal mask")
    refuse(
        workload,
        bias_here=workload.bias,
        ALiBi=workload.alibi,
        mask_here=workload.mask,
        lengths_of_q_and_k_that_differ=workload.seqlen_q != workload.seqlen_k,
        head_dim_v=workload.head_dim != workload.head_dim_v,
    )
    feeds = {name: _flat(inputs, name) for name in ("q", "k", "v")}
    feeds["last"] = np.full(workload.batch, workload.seqlen_k - 1, np.int32)
    feeds["total"] = np.array(workload.seqlen_k, np.int32)
    names = ["q", "k", "v", "", "", "last", "total"]
    attributes: dict[str, Any] = {"num_heads": workload.nheads, "kv_num_heads": workload.nheads_kv}
    if left is not None:
        attributes["local_window_size"] = left + 1
    if workload.softcap:
        attributes["softcap"] = workload.softcap
    session = _session("GroupQueryAttention", names, feeds, ["o", "k_out", "v_out"], attributes, threads)
    return Prepared(lambda: session.run(["o"], feeds), lambda returned: _unflat(workload, returned[0]))


def _decode(inputs: Inputs, threads: int) -> Prepared:
    """Prepare one query and a cache that the operator appends to in place. The last key is the new one."""
    import onnxruntime

    workload = inputs.workload
    refuse(
        workload,
        window=workload.window,
        bias_here=workload.bias,
        mask_here=workload.mask,
        ALiBi=workload.alibi,
        softcap=workload.softcap,
    )
    feeds = {name: _flat(inputs, name) for name in ("q", "k", "v")}
    feeds |= {name: np.ascontiguousarray(feeds[name][:, -1:]) for name in ("k", "v")}
    feeds |= {f"{name}_cache": inputs.heads_first(name).numpy() for name in ("k", "v")}
    feeds["last"] = np.full(workload.batch, workload.seqlen_k - 1, np.int32)
    feeds["total"] = np.array(workload.seqlen_k, np.int32)
    names = ["q", "k", "v", "k_cache", "v_cache", "last", "total"]
    attributes = {"num_heads": workload.nheads, "kv_num_heads": workload.nheads_kv}
    session = _session("GroupQueryAttention", names, feeds, ["o", "k_out", "v_out"], attributes, threads)
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("o")
    binding.bind_ortvalue_output("k_out", values["k_cache"])
    binding.bind_ortvalue_output("v_out", values["v_cache"])

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding

    return Prepared(run, lambda bound: _unflat(workload, bound.get_outputs()[0].numpy()))


def _flat(inputs: Inputs, name: str) -> Any:
    """Return (batch, seqlen, nheads * head_dim)."""
    return getattr(inputs, name).flatten(2).numpy()


def _unflat(workload: Workload, out: Any) -> list[Tensor]:
    import torch

    return [torch.from_numpy(out).reshape(workload.batch, workload.seqlen_q, workload.nheads, workload.head_dim_v)]


def _session(
    operator: str, names: list[str], feeds: dict[str, Any], outputs: list[str], attributes: dict[str, Any], threads: int
) -> Any:
    """Return a session with a graph of one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    node = helper.make_node(operator, names, outputs, domain="com.microsoft", **attributes)
    given = [helper.make_tensor_value_info(name, types[x.dtype], list(x.shape)) for name, x in feeds.items()]
    returned = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "attention", given, returned)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
