"""The sweep over the models of transformers: each verdict comes from a model that deserves it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anyattn.compat import transformers as adapter
from model_sweep import building, checks, configurations, implementations, inputs, sweep, table, verdicts
from model_sweep.classes import Subject, configuration_class
from model_sweep.verdicts import CRASH, NONE, REFUSED, RIGHT, WRONG, Judge, Verdict

NAME = "of a test"


@pytest.fixture(scope="module")
def judge() -> Judge:
    model = building.build(Subject("mistral"))
    return Judge(model, next(inputs.guesses(model)))


@pytest.fixture
def judged(judge: Judge) -> Iterator[Callable[..., Verdict]]:
    """Return a function that judges an attention function, with the masks of "eager"."""
    from transformers import AttentionInterface, masking_utils

    masking_utils.AttentionMaskInterface.register(NAME, masking_utils.eager_mask)

    def found(attention: Any, check: str = "dense") -> Verdict:
        AttentionInterface.register(NAME, attention)
        return judge.judge(check, building.ours_by_setting(judge.eager, NAME))

    yield found


@pytest.fixture
def _registered() -> Iterator[None]:
    from transformers import AttentionInterface

    before = implementations.register()
    yield
    AttentionInterface.register(implementations.OURS, before)


def plain(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2), None


@pytest.mark.parametrize("check", ["dense", "left 2", "gradients", "generate", "chunked", "packed"])
def test_plain_attention_is_judged_right(judged: Callable[..., Verdict], check: str) -> None:
    assert judged(plain, check).outcome == RIGHT


@pytest.mark.parametrize("check", ["dense", "left 2", "gradients", "generate", "chunked", "packed"])
def test_dropped_mask_is_judged_wrong(judged: Callable[..., Verdict], check: str) -> None:
    def unmasked(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        return plain(module, q, k, v, None, scaling)

    assert judged(unmasked, check).outcome == WRONG


def test_small_difference_is_judged_wrong(judged: Callable[..., Verdict]) -> None:
    def scaled(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        return plain(module, q, k, v, mask, scaling * 1.002)

    assert judged(scaled).outcome == WRONG


def test_rounding_is_judged_right(judged: Callable[..., Verdict]) -> None:
    """float64 does not round to float32's digits, so what differs there is a fault."""

    def rounded(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        out, _ = plain(module, q, k, v, mask, scaling)
        return (out.bfloat16().float() if out.dtype == torch.float32 else out), None

    verdict = judged(rounded)
    assert verdict.outcome == RIGHT
    assert verdict.error > verdicts.FLOAT32


def test_logits_of_forbidden_tokens_do_not_mask_errors() -> None:
    """Beside the lowest float32 every error looks small."""
    want = {"logits": torch.tensor([[0.5, torch.finfo(torch.float32).min, 1.0]])}
    assert verdicts.distance({"logits": want["logits"] + torch.tensor([0.0, 0.0, 0.1])}, want) == pytest.approx(0.1)
    assert verdicts.distance({"logits": want["logits"] * torch.tensor([1.0, 0.0, 1.0])}, want) == math.inf
    assert verdicts.distance(want, want) == 0


def test_other_exceptions_are_judged_a_crash(judged: Callable[..., Verdict]) -> None:
    def broken(*arrays: Any, **options: Any) -> Any:
        raise KeyError("anyattn")

    assert judged(broken).outcome == CRASH


def test_errors_of_anyattn_are_judged_a_refusal(judged: Callable[..., Verdict]) -> None:
    def refusing(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        return adapter.attention(module, q, k, v, None, unknown=torch.ones(3))

    assert judged(refusing).outcome == REFUSED


def test_missing_attention_weights_are_judged_wrong(judged: Callable[..., Verdict]) -> None:
    assert judged(plain, "attentions").outcome == WRONG


@pytest.mark.usefixtures("_registered")
def test_halved_scores_change_the_result(judge: Judge) -> None:
    """A model for which they do not could not show a fault."""
    from model_sweep.subject import mixing, sensitivity

    assert (sensitivity(judge) or 0) > 0.01
    assert (mixing(judge) or 0) > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "t5", "vit", "jamba", "deepseek_v3"])
def test_configurations_are_below_a_million_parameters(name: str) -> None:
    model = building.build(Subject(name))
    assert sum(x.numel() for x in model.parameters()) < 1_000_000


def test_small_configuration_keeps_every_kind_of_layer() -> None:
    kind = configuration_class("gemma3_text")
    assert (
        set(configurations.tiny(kind).layer_types) == set(kind().layer_types) == {"sliding_attention", "full_attention"}
    )


def test_table_shows_the_worst_outcome_of_a_model() -> None:
    """The worst outcome of a model is its result."""
    checks_of = {"dense": {"init": (RIGHT, 0.0, ""), "set": (WRONG, 1.0, "differs by 1")}}
    report = {"name": "a", "class": "A", "reason": "", "checks": checks_of, "calls": {"init": 2}}
    assert table.result(report) == WRONG
    assert table.remarks(report) == "wrong: dense (set)"
    checks_of["dense"]["set"] = (RIGHT, 0.0, "")
    assert (table.result(report), table.remarks(report)) == (RIGHT, "")
    assert table.result(report | {"calls": {}}) == "eager"
    assert table.result(report | {"checks": {}, "reason": "needs timm"}) == "not run"


def test_process_that_dies_is_judged_a_crash(tmp_path: Path) -> None:
    report = {"name": "a", "class": "A", "checks": {}, "calls": {}, "now": "image: dense (set)"}
    sweep.write(tmp_path / "a.partial", report)
    sweep.finish("a", tmp_path, "ended with -11")
    found = json.loads((tmp_path / "a.json").read_text())
    assert (table.result(found), found["reason"]) == (CRASH, "ended with -11 in image: dense")
    assert sweep.summarize([found]) == 1
    sweep.finish("b", tmp_path, "takes too long")
    found = json.loads((tmp_path / "b.json").read_text())
    assert (table.result(found), found["reason"]) == ("not run", "takes too long in building")
    assert sweep.summarize([found]) == 0


def test_names_of_checks_are_unique() -> None:
    assert set(checks.COMPILED) < set(checks.CHECKS)
    assert NONE not in checks.CHECKS
    assert sys.modules["model_sweep.checks"] is checks
