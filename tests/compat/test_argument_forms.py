"""Every parameter of every drop-in in unusual but legal forms: right, or refused by name.

A form is right if the call gives the bits of the call with the plain value; that those are right is for the other files
of this folder. A parameter that no row knows fails.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anyattn
from anyattn.compat import aule, comfyui, flash_attention, flash_attention_amd, flash_attn_triton, onnx, xformers
from anyattn.compat.flash_attn import flash_attn_interface as two
from anyattn.compat.flash_attn_3 import flash_attn_interface as three
from anyattn.compat.flash_attn_4 import interface as four
from anyattn.compat.torch import use_anyattn
from harness import forms
from harness.tensors import close, ints, normal

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*prototype.*:UserWarning")

BATCH, ROWS, KEYS, NHEADS, NHEADS_KV, HEAD_DIM = 2, 5, 7, 4, 2, 8
CU_Q, CU_K = ints(0, ROWS, 2 * ROWS), ints(0, KEYS, 2 * KEYS)
Q, K = (BATCH, ROWS, NHEADS, HEAD_DIM), (BATCH, KEYS, NHEADS_KV, HEAD_DIM)
FLAT = {"q": (BATCH * ROWS, *Q[2:]), "k": (BATCH * KEYS, *K[2:]), "v": (BATCH * KEYS, *K[2:])}
HEADS = {"query": (BATCH, NHEADS, ROWS, HEAD_DIM), "key": (BATCH, NHEADS, KEYS, HEAD_DIM)}
HEADS["value"] = HEADS["key"]
GROUPED = {**HEADS, "key": (BATCH, NHEADS_KV, KEYS, HEAD_DIM), "value": (BATCH, NHEADS_KV, KEYS, HEAD_DIM)}
VARLEN = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 8, "max_seqlen_k": 12}
CACHE = {"q": Q, "k_cache": K, "v_cache": K}
SCORES = (BATCH, NHEADS, ROWS, KEYS)


@dataclass
class Function:
    """A drop-in, the shapes of its arrays, and its other required arguments."""

    call: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, Any] = field(default_factory=dict)
    signature: Callable[..., Any] | None = None  # where inspect cannot read that of `call`
    numpy: bool = False

    @property
    def parameters(self) -> list[str]:
        return list(inspect.signature(self.signature or self.call).parameters)

    def arrays(self) -> dict[str, Tensor]:
        return {name: normal(*shape, seed=seed, dtype=DTYPE) for seed, (name, shape) in enumerate(self.shapes.items())}

    def __call__(self, **changes: Any) -> list[Tensor]:
        """Return all results as tensors; dropout uses one seed."""
        given = {**self.arrays(), **self.fixed, **changes}
        if self.numpy:
            tensors = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.ndim}
            given |= {name: x.as_subclass(Tensor).detach().resolve_neg().numpy() for name, x in tensors.items()}
        given = {name: x.clone() if name in self.shapes and name in self.copied else x for name, x in given.items()}
        torch.manual_seed(7)
        found = self.call(**given)
        results = [*found] if isinstance(found, (tuple, list)) else [found]
        return [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in results if x is not None]

    @property
    def copied(self) -> set[str]:
        """Arrays that a call may write to."""
        return {"k_cache", "v_cache"} if "k_cache" in self.shapes else set()


DTYPE = torch.float32


def hooked(*arguments: Any, **keywords: Any) -> Tensor:
    with use_anyattn():
        return F.scaled_dot_product_attention(*arguments, **keywords)


PLAIN_2 = {"dropout_p": 0.0, "softmax_scale": None, "causal": False}
PRIVATE_2 = {**PLAIN_2, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
COMFY = {"q": (BATCH, ROWS, NHEADS * HEAD_DIM), **dict.fromkeys("kv", (BATCH, KEYS, NHEADS * HEAD_DIM))}
TRIPLE = dict.fromkeys("QKV", (BATCH, NHEADS, ROWS, HEAD_DIM))
ROPE = {"q": HEADS["query"], "k": HEADS["query"], "v": HEADS["query"], "cos": (ROWS, 4), "sin": (ROWS, 4)}
QKV = {"q": Q, "k": K, "v": K}
PACKED_QKV = {"qkv": (BATCH, ROWS, 3, NHEADS, HEAD_DIM)}
PACKED_KV = {"q": Q, "kv": (BATCH, KEYS, 2, NHEADS_KV, HEAD_DIM)}
SAVED_4 = {**QKV, "out": Q, "dout": Q, "lse": (BATCH, NHEADS, ROWS)}

FUNCTIONS = {
    "sdpa": Function(anyattn.sdpa, HEADS),
    "hook": Function(hooked, HEADS, signature=anyattn.sdpa),
    "flash_attention of anyattn": Function(anyattn.flash_attention, GROUPED),
    "2": Function(two.flash_attn_func, QKV),
    "2 kv": Function(two.flash_attn_kvpacked_func, PACKED_KV),
    "2 qkv": Function(two.flash_attn_qkvpacked_func, PACKED_QKV),
    "2 varlen": Function(two.flash_attn_varlen_func, FLAT, VARLEN),
    "2 varlen kv": Function(
        two.flash_attn_varlen_kvpacked_func, {"q": FLAT["q"], "kv": (BATCH * KEYS, 2, *K[2:])}, VARLEN
    ),
    "2 varlen qkv": Function(
        two.flash_attn_varlen_qkvpacked_func,
        {"qkv": (BATCH * ROWS, 3, NHEADS, HEAD_DIM)},
        {"cu_seqlens": CU_Q, "max_seqlen": 8},
    ),
    "2 cache": Function(two.flash_attn_with_kvcache, CACHE),
    "2 forward": Function(two._flash_attn_forward, QKV, {**PRIVATE_2, "return_softmax": False}),
    "2 varlen forward": Function(two._flash_attn_varlen_forward, FLAT, {**VARLEN, **PLAIN_2}),
    "3": Function(three.flash_attn_func, QKV),
    "3 qkv": Function(three.flash_attn_qkvpacked_func, PACKED_QKV),
    "3 varlen": Function(three.flash_attn_varlen_func, FLAT, VARLEN),
    "3 cache": Function(three.flash_attn_with_kvcache, CACHE),
    "4": Function(four.flash_attn_func, QKV),
    "4 varlen": Function(four.flash_attn_varlen_func, FLAT, {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}),
    "4 forward": Function(four._flash_attn_fwd, QKV),
    "4 backward": Function(four._flash_attn_bwd, SAVED_4),
    "xformers": Function(
        xformers.memory_efficient_attention,
        {"query": Q, "key": (*K[:2], NHEADS, HEAD_DIM), "value": (*K[:2], NHEADS, HEAD_DIM)},
    ),
    "comfyui": Function(comfyui.attention, COMFY, {"heads": NHEADS}),
    "onnx": Function(onnx.attention, {"Q": HEADS["query"], "K": HEADS["key"], "V": HEADS["key"]}, numpy=True),
    "aule": Function(aule.flash_attention, GROUPED),
    "aule sdpa": Function(aule.scaled_dot_product_attention, HEADS),
    "aule rope": Function(aule.flash_attention_rope, ROPE),
    "flash_attention": Function(flash_attention.flash_attention_forward, TRIPLE),
    "flash_attention backward": Function(
        flash_attention.flash_attention_backward,
        {**TRIPLE, "O": TRIPLE["Q"], "dO": TRIPLE["Q"]},
        {"l": torch.ones(BATCH, NHEADS, ROWS), "m": torch.ones(BATCH, NHEADS, ROWS)},
    ),
    "amd": Function(flash_attention_amd.flash_attn_func, QKV),
    "triton": Function(flash_attn_triton.flash_attn_func, QKV),
    "triton qkv": Function(flash_attn_triton.flash_attn_qkvpacked_func, PACKED_QKV),
}

# What a parameter takes -> the parameters, each with a plain value that changes the result.
VALUES: dict[str, dict[str, Any]] = {
    "real": {
        **dict.fromkeys(("scale", "softmax_scale"), 0.25),
        "softcap": 2.0,
        **dict.fromkeys(("dropout_p", "p"), 0.5),
    },
    "integer": {
        **dict.fromkeys(("window_size_left", "window_size_right"), 1),
        **dict.fromkeys(("left_window_size", "right_window_size"), 1),
        **{"attention_chunk": 2, "num_splits": 2, "seqlen_k_per_split": 64, "min_seqlen_k": 2, "sm_margin": 4},
        **{"max_seqlen_q": 12, "max_seqlen_k": 12, "max_seqlen": 12, "num_heads_q": NHEADS, "heads": NHEADS},
        **{"Bc": 16, "Br": 16, "q_num_heads": NHEADS, "kv_num_heads": NHEADS, "softmax_precision": 1},
        **{"qk_matmul_output_mode": 0},
    },
    "flag": {
        **dict.fromkeys(("causal", "is_causal", "enable_gqa", "deterministic", "return_attn_probs"), True),
        **dict.fromkeys(("return_lse", "return_softmax_lse", "rotary_interleaved", "zero_tensors"), True),
        **dict.fromkeys(("use_half", "return_stats", "skip_output_reshape", "disable_scheduler_metadata"), True),
        **dict.fromkeys(("pack_gqa", "return_softmax", "gather_bwd_recompute_p", "skip_reshape"), False),
    },
    "pair": {"window_size": (1, 1)},
    "table": {
        **{"cu_seqlens_q": ints(0, 3, 8), "cu_seqlens_k": ints(0, 7, 12), "cu_seqlens": ints(0, 3, 8)},
        **{"seqused_q": ints(2, 4), "seqused_k": ints(5, 6), "leftpad_k": ints(2, 0), "cache_leftpad": ints(2, 0)},
        **{"cache_seqlens": ints(5, 3), "cache_batch_idx": ints(1, 0), "nonpad_kv_seqlen": ints(5, 4)},
    },
    "array": {  # beside q, k and v of any name
        "alibi_slopes": normal(NHEADS, seed=20, dtype=DTYPE).abs(),
        "learnable_sink": normal(NHEADS, seed=21, dtype=DTYPE),
        **{
            name: normal(BATCH, NHEADS_KV, seed=22, dtype=DTYPE).abs()
            for name in ("q_descale", "k_descale", "v_descale")
        },
        **dict.fromkeys(("attn_mask", "attn_bias", "mask"), normal(*SCORES, seed=23, dtype=DTYPE)),
        "dlse": normal(BATCH, NHEADS, ROWS, seed=24, dtype=DTYPE),
    },
}
# Each has tests of its own, in the files of its drop-in.
ELSEWHERE = {
    *("k", "v", "rotary_cos", "rotary_sin", "rotary_seqlens", "cu_seqlens_k_new", "block_table", "page_table", "qv"),
    *("scheduler_metadata", "out", "lse", "dq", "dk", "dv", "rot_cos", "rot_sin", "past_key", "past_value", "l", "m"),
    *("score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars", "gather_kv_indices"),
    *("block_sparse_tensors", "block_sparse_tensors_bwd", "gather_bwd_token_chunk", "output_dtype", "op"),
    *("attn_precision", "kwargs"),  # no effect, and names that are refused
    *("tile_mn", "mma_pv_is_rs", "intra_wg_overlap", "num_threads", "_arch", "m_block_size", "n_block_size"),
    *("num_stages_Q", "num_stages_dO", "SdP_swapAB", "dKV_swapAB", "dQ_swapAB", "AtomLayoutMSdP", "AtomLayoutNdKV"),
    *("AtomLayoutMdQ", "V_in_regs"),
}
# Of some functions a parameter is another thing, or means something with other arguments alone.
OTHER: dict[tuple[str, str], Any] = {
    ("aule rope", "window_size"): ("integer", 2),
    ("sdpa", "enable_gqa"): ("flag", False),
    ("hook", "enable_gqa"): ("flag", False),
    ("3 qkv", "num_heads_q"): ("integer", NHEADS),
    ("4 forward", "gather_bwd_recompute_p"): ("flag", True),
    ("3 qkv", "q_descale"): ("array", normal(BATCH, NHEADS, seed=22, dtype=DTYPE).abs()),
    ("3 qkv", "k_descale"): ("array", normal(BATCH, NHEADS, seed=22, dtype=DTYPE).abs()),
    ("3 qkv", "v_descale"): ("array", normal(BATCH, NHEADS, seed=22, dtype=DTYPE).abs()),
    ("onnx", "q_num_heads"): ("integer", 0),
    ("onnx", "kv_num_heads"): ("integer", 0),
    # packed calls of these are those of other functions
    **{
        (kind, name): None
        for kind in ("3 cache", "4 forward", "4 backward")
        for name in ("cu_seqlens_q", "cu_seqlens_k")
    },
}
GRADLESS = {
    "2 cache",
    "2 forward",
    "2 varlen forward",
    "3 cache",
    "4 forward",
    "4 backward",
    "flash_attention backward",
}
# torch itself decides before the hook is asked; a tensor in causal's place is taken for rotary tables.
REFUSES = {
    *((kind, name) for kind in ("2 cache", "3 cache") for name in ("k_cache", "v_cache")),  # they are never copied
    ("aule", "causal"),
    *(("hook", name) for name in ("dropout_p", "is_causal", "scale", "enable_gqa")),
}


def row(kind: str, name: str) -> tuple[str, Any] | None:
    """Return what a parameter takes, and a value of it."""
    if (kind, name) in OTHER:
        found: tuple[str, Any] | None = OTHER[kind, name]
        return found
    if name in FUNCTIONS[kind].shapes:
        return "array", FUNCTIONS[kind].arrays()[name]
    return next(((takes, values[name]) for takes, values in VALUES.items() if name in values), None)


ROWS_OF = {(kind, name): row(kind, name) for kind, x in FUNCTIONS.items() for name in x.parameters}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_parameter_has_a_row_in_the_table(kind: str) -> None:
    known = {*ELSEWHERE, *(name for other, name in OTHER if other == kind)}
    missing = [name for name in FUNCTIONS[kind].parameters if ROWS_OF[kind, name] is None and name not in known]
    assert not missing


def cases(*takes: str) -> list[Any]:
    found = [(kind, name) for (kind, name), x in ROWS_OF.items() if x is not None and x[0] in takes]
    return [pytest.param(kind, name, id=f"{kind}-{name}") for kind, name in found]


GENERATORS: dict[str, Callable[[Any], forms.Forms]] = {
    "real": forms.reals,
    "integer": forms.integers,
    "flag": forms.flags,
    "pair": forms.pairs,
    "table": forms.tables,
    "array": forms.layouts,
}
REFUSALS = (TypeError, ValueError, NotImplementedError)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(
        one.dtype == other.dtype and torch.equal(one.as_subclass(Tensor), other)
        for one, other in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("kind, name", cases("real", "integer", "flag", "pair", "table"))
def test_all_forms_of_a_scalar_or_table_give_the_same_result(kind: str, name: str) -> None:
    function, found = FUNCTIONS[kind], ROWS_OF[kind, name]
    assert found is not None
    takes, value = found
    want = function(**{name: value})
    wrong = []
    for form, x in GENERATORS[takes](value):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                right = same(function(**{name: x}), want)
            except REFUSALS as error:
                right = ((kind, name) in REFUSES and name in str(error)) or str(error)
        if right is not True:
            wrong.append((form, right))
    assert not wrong


@pytest.mark.parametrize("name", [x.values[1] for x in cases(*GENERATORS) if x.values[0] == "sdpa"])
def test_forms_that_torch_accepts_give_the_result_of_torch(name: str) -> None:
    """Every form that torch's own function takes; dropout draws other entries."""
    found = ROWS_OF["sdpa", name]
    assert found is not None
    takes, value = found
    alike, given = [], FUNCTIONS["sdpa"].arrays()
    for form, x in GENERATORS[takes](value):
        arguments = {**given, name: 0 * x if name == "dropout_p" else x}
        try:
            want = F.scaled_dot_product_attention(**arguments)
        except TypeError:
            continue
        torch.testing.assert_close(anyattn.sdpa(**arguments), want, rtol=1e-5, atol=1e-5, msg=form)
        alike.append(form)
    assert alike or name in ("is_causal", "enable_gqa")  # of which torch takes nothing but a bool


@pytest.mark.parametrize("kind, name", [x for x in cases("real") if x.values[0] not in GRADLESS])
def test_a_scalar_that_needs_a_gradient_is_refused(kind: str, name: str) -> None:
    with pytest.raises(TypeError, match=r"must not require a gradient|must be float, not"):
        FUNCTIONS[kind](**{name: torch.tensor(0.25, requires_grad=True)})


@pytest.mark.parametrize("kind, name", cases("array"))
def test_results_do_not_depend_on_the_memory_layout(kind: str, name: str) -> None:
    """Strides, offsets, labels; elements that share memory; in gradients too where the function has them."""
    function, found = FUNCTIONS[kind], ROWS_OF[kind, name]
    assert found is not None
    want = function(**{name: found[1].clone()})
    wrong = [form for form, x in forms.layouts(found[1]) if not accepts(function, kind, name, x, want)]
    for form, x in forms.aliases(found[1]):
        if not accepts(function, kind, name, x, function(**{name: x.clone(memory_format=torch.contiguous_format)})):
            wrong.append(form)
    assert not wrong


def accepts(function: Function, kind: str, name: str, x: Tensor, want: list[Tensor]) -> bool:
    try:
        got = function(**{name: x})
    except (*REFUSALS, AssertionError) as error:
        return (kind, name) in REFUSES and name in str(error)
    if kind == "hook":  # torch gives some strides to a kernel of its own
        return all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(got, want, strict=True))
    return same(got, want)


@pytest.mark.parametrize("kind, name", [x for x in cases("array") if x.values[0] not in ("onnx", "hook")])
def test_tensors_that_are_not_their_memory_are_refused(kind: str, name: str) -> None:
    function, found = FUNCTIONS[kind], ROWS_OF[kind, name]
    assert found is not None
    for form, x in forms.refused(found[1]):
        with pytest.raises(REFUSALS, match=r"must be|must have|no gradients"):
            function(**{name: x})
            pytest.fail(form)


@pytest.mark.parametrize("kind, name", [x for x in cases("array") if x.values[0] not in ("onnx", "hook")])
def test_a_tensor_without_memory_gives_no_values(kind: str, name: str) -> None:
    """Alone it gives one; with others on a CPU it is refused."""
    function, found = FUNCTIONS[kind], ROWS_OF[kind, name]
    assert found is not None
    if name == "qkv" and not function.fixed:
        assert all(x.is_meta for x in function(**{name: found[1].to("meta")}))
        return
    with pytest.raises((*REFUSALS, RuntimeError), match=r"is on meta|is on cpu|on the expected device|must be on"):
        function(**{name: found[1].to("meta")})


MASKS = [x for x in cases("array") if x.values[1] in ("attn_mask", "attn_bias", "mask")]


@pytest.mark.parametrize("kind, name", MASKS)
def test_integer_masks_are_refused(kind: str, name: str) -> None:
    """Booleans and the query's dtype; 0 and 1 as integers would be added where they are meant to hide."""
    function, shown = FUNCTIONS[kind], normal(*SCORES, seed=23) > -1
    if kind != "xformers":  # where a tensor is a bias
        want = function(**{name: torch.zeros(SCORES, dtype=DTYPE).masked_fill(~shown, -torch.inf)})
        close(function(**{name: shown}), want, rtol=1e-5, atol=1e-6)
        want = function(**{name: shown})
        assert all(accepts(function, kind, name, x, want) for _, x in forms.layouts(shown))
    for dtype in (torch.uint8, torch.int32, torch.int64):
        if kind != "onnx":
            with pytest.raises((*REFUSALS, RuntimeError), match=r"mask|bias"):
                function(**{name: shown.to(dtype)})


@pytest.mark.parametrize("kind", [kind for kind, x in FUNCTIONS.items() if not x.fixed or "heads" in x.fixed])
@pytest.mark.parametrize("size", [BATCH, ROWS, KEYS], ids=["batch", "rows", "keys"])
def test_empty_sizes_give_zeros_without_nan(kind: str, size: int) -> None:
    """No sequences and no queries give nothing, no keys give 0; never NaN. All sizes of the axes differ."""
    function = FUNCTIONS[kind]
    shapes = {name: tuple(0 if n == size else n for n in shape) for name, shape in function.shapes.items()}
    if size == BATCH:  # the number of key heads too
        shapes = {name: (0 if s[0] == size else s[0], *s[1:]) for name, s in function.shapes.items()}
    results = function(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    assert all(x.numel() == 0 or bool((x == 0).all() or x.isinf().all()) for x in results)
