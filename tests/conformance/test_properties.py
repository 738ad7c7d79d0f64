"""Random problems, all features mixed, on every engine. `--hypothesis-profile=full` draws 2,000 of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from harness.backends import Engine
from harness.cases import CONTENTS, DTYPES, LENGTHS, Case
from harness.checks import refused, wrong
from harness.inputs import BROADCASTS, LAYOUTS, build


def _sides() -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.integers(0, 100))


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Any call that is allowed: packed sequences have no dense bias or mask."""
    lengths = draw(st.sampled_from(LENGTHS))
    dense = "varlen" not in lengths
    broadcasts = st.sampled_from(("", "", *BROADCASTS)) if dense else st.just("")
    sizes = st.one_of(st.integers(0, 70), st.sampled_from((1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)))
    heads = st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128)))
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        name="drawn",
        batch=draw(st.integers(0, 3)),
        seqlen_q=draw(sizes),
        seqlen_k=draw(sizes),
        nheads_kv=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(heads),
        head_dim_v=draw(heads),
        dtype=dtype,
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(_sides(), _sides()))),
        chunk=draw(st.one_of(st.just(0), st.integers(1, 80))),
        alignment=draw(st.sampled_from(("bottom-right", "top-left"))),
        offset=draw(st.sampled_from(("", "", "int", "each"))),
        lengths=lengths,
        mask=draw(broadcasts),
        bias=draw(broadcasts),
        bias_dtype=draw(st.sampled_from(("", "float64" if dtype == "float64" else "float32"))),
        alibi=draw(st.sampled_from(("", "h", "bh"))),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.7, 20.0))),
        sink=draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.8))),
        scale=draw(st.one_of(st.none(), st.floats(-1, 1, width=32))),
        layout=draw(st.sampled_from(LAYOUTS)),
        dlse=draw(st.booleans()),
        content=draw(st.sampled_from(CONTENTS)),
        page_size=draw(st.integers(0, 40)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(case=problems())
def test_random_problems(engine: Engine, case: Case) -> None:
    if not engine.computes(case.dtype):
        case = replace(case, dtype="float32", bias_dtype="")
    inputs = build(case)
    before = inputs.bytes()
    assert not wrong(inputs, "forward", engine)
    assert refused(inputs, "backward", engine) or not wrong(inputs, "backward", engine)
    assert inputs.bytes() == before, "an input, or memory around it, was written"
