"""Models of transformers over several processes: losses and gradients equal one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from harness.ranks import Ranks

if sys.version_info < (3, 11):
    pytest.skip("transformers has left Python 3.10 behind", allow_module_level=True)

MODELS = ("llama", "mistral", "gemma2", "qwen2", "gpt_oss", "deepseek")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks(2)
    yield found
    found.close()


def check(found: list[tuple[float, float]]) -> None:
    for loss, gradients in found:
        assert loss < 1e-5 and gradients < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_one_process(name: str, ranks: Ranks) -> None:
    check(ranks.results("model_jobs.differences", name, "plain", "zigzag", "auto"))


@pytest.mark.parametrize("form", ["left", "right", "packed"])
@pytest.mark.parametrize(("name", "sharding", "schedule"), [
    ("llama", "zigzag", "ring"), ("mistral", "contiguous", "gather"), ("gemma2", "striped", "ulysses"),
])  # fmt: skip
def test_padding_and_packed_documents(form: str, name: str, sharding: str, schedule: str, ranks: Ranks) -> None:
    check(ranks.results("model_jobs.differences", name, form, sharding, schedule))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("implementation", "model must have attn_implementation='anyattn', got 'sdpa'"),
        ("encoder", "labels must be None for BertForMaskedLM"),
        ("encoder-decoder", "is an encoder with a decoder"),
        ("pixels", "batch must have only"),
        ("pairs", "attention_mask must be (batch, seqlen)"),
        ("rows", "batch must have one row if its positions restart, got 2"),
        ("tokens", "batch must have input_ids or inputs_embeds"),
        ("weights", "output_attentions must be None in context_parallel"),
        ("nested", "context_parallel must not be nested"),
    ],
)
def test_calls_that_would_differ_from_one_process_are_refused(what: str, text: str, ranks: Ranks) -> None:
    for error in ranks.run("model_jobs.refused", what):
        assert isinstance(error, (ValueError, NotImplementedError, RuntimeError)) and text in str(error), error
