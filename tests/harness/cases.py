"""Cases of the tests: a table in which every pair of features occurs, and a named case for each corner case.

`scripts/make_cases.py` writes the table; `anyattn.testing` makes the arrays of a case.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyattn.testing import Case

_MASKS: dict[str, dict[str, object]] = {
    "none": {},
    "causal": {"causal": True},
    "causal_topleft": {"causal": True, "alignment": "top-left"},
    "offset": {"causal": True, "offset": "each"},
    "window": {"window": (17, 5)},
    "window_causal": {"window": (33, None), "causal": True},
    "chunk": {"chunk": 50},
    "leftpad": {"lengths": "leftpad", "causal": True},
    "seqused": {"lengths": "seqused"},
    "bool": {"mask": "full"},
    "indices": {"kv_indices": "shared", "causal": True},
    "indices_heads": {"kv_indices": "heads", "window": (90, 20)},
    "varlen": {"lengths": "varlen"},
    "varlen_causal": {"lengths": "varlen", "causal": True},
    "paged": {"lengths": "paged"},
}
_SCALES: dict[str, float | None] = {"default": None, "negative": -0.3, "0": 0.0}


def _table() -> list[dict[str, str]]:
    header, *rows = (Path(__file__).parent / "pairwise.txt").read_text(encoding="utf-8").splitlines()
    return [dict(zip(header.split(), row.split(), strict=True)) for row in rows]


def pairwise() -> list[Case]:
    """Return the committed table as cases."""
    return [_from_row(i, row) for i, row in enumerate(_table())]


def sampled(seed: int, count: int) -> list[Case]:
    """Return rows of values sampled from the table's columns. Enough rows contain nearly every triple of values."""
    table, rng = _table(), random.Random(seed)
    columns = {name: sorted({row[name] for row in table}) for name in table[0]}
    rows = [{name: rng.choice(values) for name, values in columns.items()} for _ in range(count)]
    packed = [row | {"bias": "no"} if row["mask"].startswith("varlen") else row for row in rows]
    return [_from_row(seed * count + i, row) for i, row in enumerate(packed)]


def _from_row(index: int, row: dict[str, str]) -> Case:
    head_dim, group = int(row["head_dim"]), int(row["group"])
    shape = f"{row['seqlen_q']}x{row['seqlen_k']}x{row['head_dim']}"
    case = Case(
        name=f"pair{index:03d}-{row['mask']}-{shape}-{row['dtype']}",
        batch=int(row["batch"]),
        seqlen_q=int(row["seqlen_q"]),
        seqlen_k=int(row["seqlen_k"]),
        nheads_kv=1 if group == 8 else 2,
        group=group,
        head_dim=head_dim,
        head_dim_v=head_dim if row["head_dim_v"] == "same" else int(row["head_dim_v"]),
        dtype=row["dtype"],
        bias="" if row["bias"] == "no" else row["bias"],
        alibi="" if row["alibi"] == "no" else row["alibi"],
        softcap=float(row["softcap"]),
        sink=row["sink"] == "1",
        dropout_p=float(row["dropout"]),
        scale=_SCALES[row["scale"]],
        layout=row["layout"],
        dlse=row["dlse"] == "1",
        seed=index,
    )
    return replace(case, **_MASKS[row["mask"]])  # type: ignore[arg-type]


_EVERYTHING: dict[str, Any] = {
    **{"group": 4, "batch": 3, "lengths": "both", "causal": True, "window": (60, None), "chunk": 90, "dropout_p": 0.25},
    **{"bias": "full", "mask": "b1", "alibi": "bh", "softcap": 3.0, "sink": True, "dlse": True},
}
NAMED = [
    # No queries, no keys, no sequences, no visible keys.
    Case("plain"),
    Case("rows_without_keys", causal=True, seqlen_q=111, seqlen_k=63, dlse=True),
    Case("rows_without_keys_sink", causal=True, seqlen_q=70, seqlen_k=5, sink=True, dlse=True),
    Case("no_key_at_all_sink", seqlen_k=0, sink=True, dlse=True),
    Case("every_row_masked", window=(0, 0), offset="each", content="offset_outside", sink=True, dlse=True),
    Case("masked_rows_and_columns", mask="full", content="mask_lines", dlse=True),
    Case("bias_minus_infinity", bias="full", content="bias_lines", sink=True, dlse=True),
    Case("bias_minus_infinity_f16", bias="full", content="bias_lines", dtype="float16"),
    Case("empty_sequences", lengths="varlen", batch=5, content="empty_sequences", dlse=True),
    Case("lengths_zero", lengths="both", batch=3, content="empty_sequences", causal=True, sink=True, dlse=True),
    Case("no_rows_no_keys", seqlen_q=0, seqlen_k=0, bias="h1", sink=True),
    # One key, one query, and sizes just above a tile.
    Case("row_sees_one_key", window=(0, 0)),
    Case("one_key", seqlen_k=1, dlse=True),
    Case("decode", seqlen_q=1, seqlen_k=517, group=4, causal=True),
    Case("decode_f16", seqlen_q=1, seqlen_k=517, group=8, nheads_kv=1, causal=True, dtype="float16", head_dim=128),
    Case("decode_paged", seqlen_q=1, seqlen_k=517, group=4, causal=True, lengths="paged", page_size=16),
    Case("few_rows_many_heads", seqlen_q=3, seqlen_k=300, group=16, nheads_kv=1, causal=True),
    Case("long_key_axis", batch=1, seqlen_q=2, seqlen_k=5000, nheads_kv=1),
    Case("long_query_axis", batch=1, seqlen_q=5000, seqlen_k=2, nheads_kv=1, dlse=True),
    Case("wide_heads", head_dim=300, head_dim_v=513, seqlen_q=20, seqlen_k=40),
    Case("narrow_v", head_dim=3, head_dim_v=1, seqlen_q=130, seqlen_k=257),
    # Numbers at their limits.
    Case("huge_scores", content="huge", dlse=True),
    Case("huge_scores_f16", content="huge", dtype="float16"),
    Case("huge_scores_softcap", content="huge", softcap=30.0, causal=True),
    Case("very_negative_scores", content="all_negative", causal=True, dlse=True),
    Case(
        "very_negative_scores_below_a_sink_f64",
        batch=1,
        seqlen_q=8,
        seqlen_k=48,
        nheads_kv=1,
        head_dim=80,
        head_dim_v=64,
        dtype="float64",
        alignment="top-left",
        offset="int",
        lengths="both",
        mask="expanded",
        bias="rank2",
        sink=True,
        dropout_p=0.8,
        layout="any",
        dlse=True,
        content="all_negative",
        seed=2946002679,
        page_size=11,
        bias_dtype="float64",
    ),
    Case("scale_zero_bf16", dtype="bfloat16", scale=0.0, dlse=True),
    Case("scale_zero", scale=0.0, causal=True, sink=True, dlse=True),
    Case("scale_negative_bf16", dtype="bfloat16", scale=-0.4, head_dim=64),
    Case("scale_below_float32", scale=1e-50, dtype="float32"),
    Case("scale_below_bf16", scale=-1e-50, dtype="bfloat16"),
    Case("equal_keys", content="equal_keys"),
    Case("rising_scores", content="rising", seqlen_k=517, dlse=True),
    Case("falling_scores", content="falling", seqlen_k=517, dlse=True),
    Case("sink_dominates", sink=True, content="big_sink", dlse=True),
    Case("sink_minus_infinity", sink=True, content="no_sink", causal=True, seqlen_q=111, seqlen_k=63),
    Case("alibi_steep", alibi="h", content="steep", causal=True, seqlen_q=200, seqlen_k=200),
    Case("dropout_most", dropout_p=0.97, dlse=True),
    Case("dropout_least", dropout_p=2.0**-16, causal=True),
    Case("dropout_varlen", dropout_p=0.4, lengths="varlen", batch=4, group=2),
    # Intervals.
    Case("window_of_past_keys", window=(20, 0), seqlen_q=300, seqlen_k=300),
    Case("window_of_future_keys", window=(0, 20), seqlen_q=300, seqlen_k=200),
    Case("window_top_left", window=(4, 9), alignment="top-left", seqlen_q=90, seqlen_k=300),
    Case("window_past_only_unbounded_right", window=(5, None), seqlen_q=111, seqlen_k=300),
    Case("chunk_of_one", chunk=1, alignment="top-left"),
    Case("chunk_negative_positions", chunk=7, offset="each", causal=True, batch=5),
    Case("chunk_window", chunk=64, window=(10, 3), seqlen_q=200, seqlen_k=200),
    Case("offset_int", offset="int", causal=True, window=(30, 2)),
    Case("leftpad_top_left", lengths="leftpad", causal=True, alignment="top-left", batch=4, alibi="bh"),
    Case("leftpad_seqused", lengths="both", causal=True, window=(40, None), batch=4, dropout_p=0.2),
    Case("varlen_window_alibi", lengths="varlen", window=(11, 3), alibi="bh", batch=6, softcap=5.0),
    Case("varlen_seqused", lengths="varlen_seqused", causal=True, batch=5, sink=True, dlse=True),
    Case("paged_varlen", lengths="paged_varlen", causal=True, batch=4, group=4),
    Case("paged_page_of_one", lengths="paged", page_size=1, causal=True, batch=3),
    Case("paged_odd_page_f16", lengths="paged", page_size=37, batch=3, dtype="float16", dropout_p=0.1),
    Case("paged_bias_window", lengths="paged", page_size=5, bias="full", window=(40, 3), sink=True),
    # Layouts.
    Case("last_dimension_not_contiguous", layout="last"),
    Case("negative_strides", layout="reversed", causal=True),
    Case("expanded", layout="expanded", batch=3, nheads_kv=3),
    Case("sliced_every_second_row", layout="slices", batch=2),
    Case("any_layout", layout="any", dlse=True),
    Case("any_layout_f16", layout="any", dtype="float16", group=2, causal=True, seed=1),
    Case("any_layout_bf16_paged", layout="any", dtype="bfloat16", lengths="paged", page_size=7, seed=2),
    Case("any_layout_varlen", layout="any", lengths="varlen", batch=4, alibi="bh", sink=True, dlse=True, seed=3),
    Case("any_layout_scores", layout="any", bias="full", mask="h1", lengths="both", dropout_p=0.2, dlse=True, seed=4),
    Case("any_layout_decode", layout="any", seqlen_q=1, seqlen_k=200, group=4, bias="expanded", mask="row", seed=5),
    Case("any_layout_f64", layout="any", dtype="float64", alibi="h", bias="column", head_dim=9, head_dim_v=1, seed=6),
    # Selected keys.
    Case("indices", kv_indices="shared", dlse=True, seed=1),
    Case("indices_of_heads", kv_indices="heads", group=4, nheads_kv=3, dlse=True, seed=2),
    Case("indices_decode", kv_indices="shared", seqlen_q=1, seqlen_k=517, group=8, causal=True, seed=3),
    Case("indices_of_one_kv_head", kv_indices="heads", seqlen_q=9, group=70, nheads_kv=1, head_dim=72, seed=4),
    Case("indices_varlen", kv_indices="shared", lengths="varlen", batch=5, causal=True, sink=True, dlse=True, seed=5),
    Case("indices_varlen_of_heads", kv_indices="heads", lengths="varlen_seqused", batch=4, group=2, alibi="bh", seed=6),
    Case("indices_paged", kv_indices="shared", lengths="paged", page_size=7, batch=3, group=2, dropout_p=0.3, seed=7),
    Case("indices_paged_varlen", kv_indices="heads", lengths="paged_varlen", batch=3, causal=True, seed=8),
    Case("indices_empty_sequences", kv_indices="shared", lengths="both", batch=3, content="empty_sequences", seed=9),
    Case("indices_no_keys", kv_indices="shared", seqlen_k=0, sink=True, dlse=True, seed=10),
    Case("indices_chunk", kv_indices="heads", chunk=20, offset="each", seqlen_k=300, sink=True, dlse=True, seed=11),
    Case("indices_masks", kv_indices="shared", mask="h1", bias="full", group=2, softcap=3.0, dlse=True, seed=12),
    Case("indices_rows", kv_indices="heads", mask="row", bias="column", dtype="bfloat16", seed=13),
    Case("indices_any_layout", kv_indices="heads", layout="any", bias="b1", lengths="both", dlse=True, seed=14),
    # Quantised keys and values.
    Case("int8", stored="int8", dlse=True, seed=21),
    Case("int8_f64", stored="int8", dtype="float64", scales="heads", dlse=True, seed=22),
    Case("int8_bf16", stored="int8", dtype="bfloat16", head_dim=64, head_dim_v=64, causal=True, group=4, seed=23),
    Case("int8_of_sequences", stored="int8", scales="sequences", batch=3, lengths="both", causal=True, seed=24),
    Case("int8_decode", stored="int8", seqlen_q=1, seqlen_k=517, group=4, causal=True, seed=25),
    Case("int8_decode_paged", stored="int8", seqlen_q=1, seqlen_k=300, group=8, lengths="paged", page_size=16, seed=26),
    Case(
        "int8_decode_f16", stored="int8", scales="one", seqlen_q=1, seqlen_k=90, dtype="float16", head_dim=128, seed=27
    ),
    Case("int8_decode_f64", stored="int8", seqlen_q=2, seqlen_k=90, dtype="float64", causal=True, seed=28),
    Case("int8_varlen", stored="int8", lengths="varlen", batch=4, window=(20, 3), sink=True, dlse=True, seed=29),
    Case("int8_page_of_one", stored="int8", lengths="paged", page_size=1, batch=3, causal=True, alibi="bh", seed=30),
    Case("int8_indices", stored="int8", kv_indices="heads", group=2, dropout_p=0.2, seed=31),
    Case("int8_any_layout", stored="int8", layout="any", bias="full", mask="h1", softcap=3.0, dlse=True, seed=32),
    Case("e4m3", stored="float8_e4m3fn", causal=True, group=2, dlse=True, seed=33),
    Case("e4m3_bf16_heads", stored="float8_e4m3fn", scales="heads", dtype="bfloat16", seqlen_q=3, group=2, seed=34),
    Case(
        "e4m3_decode", stored="float8_e4m3fn", seqlen_q=1, seqlen_k=130, group=8, head_dim=128, head_dim_v=72, seed=35
    ),
    Case(
        "e4m3_any_layout", stored="float8_e4m3fn", layout="any", lengths="paged_varlen", batch=3, scales="one", seed=36
    ),
    Case("e4m3_packed_layout", stored="float8_e4m3fn", layout="packed", dtype="float16", seed=37),
    Case("e5m2", stored="float8_e5m2", window=(30, 0), dlse=True, seed=38),
    Case("e5m2_decode_f16", stored="float8_e5m2", seqlen_q=1, seqlen_k=200, dtype="float16", causal=True, seed=39),
    Case("e5m2_expanded", stored="float8_e5m2", layout="expanded", scales="sequences", seqlen_q=9, seed=40),
    # Broadcast bias and mask.
    Case("bias_of_rank_two", bias="rank2", dlse=True),
    Case("bias_of_rank_one", bias="rank1", group=4),
    Case("bias_of_rank_three", bias="rank3", causal=True),
    Case("bias_per_row", bias="column", softcap=4.0),
    Case("bias_one_number", bias="one", batch=3),
    Case("bias_expanded", bias="expanded", batch=3),
    Case("bias_float32_with_f16", bias="h1", dtype="float16", bias_dtype="float32"),
    Case("bias_float32_with_bf16", bias="full", dtype="bfloat16", bias_dtype="float32", group=2),
    Case("mask_of_keys", mask="row", group=4),
    Case("mask_of_rank_two", mask="rank2", causal=True),
    Case("mask_expanded_bias", mask="expanded", bias="b1"),
    Case("mask_per_row", mask="column", bias="row", dropout_p=0.2),
    Case("everything", **_EVERYTHING, scale=-0.2, layout="packed"),
    Case("everything_indices", **_EVERYTHING, scale=-0.2, kv_indices="heads"),
    Case("everything_indices_bf16", **_EVERYTHING, scale=0.2, dtype="bfloat16", head_dim=64, kv_indices="shared"),
    Case("everything_bf16", **_EVERYTHING, scale=0.2, dtype="bfloat16", head_dim=64),
]

PAIRWISE = pairwise()
ALL = [*NAMED, *PAIRWISE]
DIFFERENTIABLE = [case for case in ALL if not case.stored]  # tangents do not support quantised keys


def named(name: str) -> Case:
    """Return the named case with this name."""
    return next(case for case in NAMED if case.name == name)


def small(cases: list[Case], entries: int) -> list[Case]:
    """Return the cases with at most `entries` scores, for slow backends."""
    return [c for c in cases if c.batch * c.nheads_kv * c.group * c.seqlen_q * c.seqlen_k <= entries]


SMALL = small(ALL, 20_000)  # a few seconds per engine
