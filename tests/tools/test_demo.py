"""The demo: a tiny version from beginning to end, and what of its model a comparison of losses would not reveal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from anyattn.cli import demo

torch = pytest.importorskip("torch")
for name in demo.NEEDS:
    pytest.importorskip(name)

FOLDER = demo.script().parent


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_losses_equal_those_of_torch(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. Ünïcödé, too.\n" * 60, encoding="utf-8")
    picture = tmp_path / "demo.png"
    tiny = f"--text {text} --steps 6 --batch 2 --context 96 --generate 8 --longest 1024 --prompt The --output {picture}"
    command = [sys.executable, "-m", "anyattn", "demo", *tiny.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    difference = re.search(r"largest difference of the two losses in any step: (\S+)", result.stdout)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_title_of_the_memory_panel_states_the_result() -> None:
    from demo import Use, memory_title

    measured = {1024: Use(2**20, 0.1), 8192: Use(5 * 2**20, 0.2)}
    assert memory_title(measured) == "8,192 tokens in 5.0 MiB;\nstandard attention would need 1.1 GiB"
    unknown = {8192: Use(None, 0.2)}
    assert memory_title(unknown) == "8,192 tokens without the 1.1 GiB\nthat standard attention needs"


def test_training_lowers_the_loss() -> None:
    from gpt import Config
    from train import Corpus, Trainer

    corpus = Corpus(torch.arange(2000) % 7, "abcdefg")
    trainer = Trainer("anyattn", Config(vocab_size=7, context=64, nlayers=1))
    batches = corpus.batches(2, 64, torch.Generator().manual_seed(0))
    for _ in range(30):
        trainer.step(next(batches))
    assert trainer.losses[-1] < 0.3 * trainer.losses[0]
    assert 0 < trainer.attention_share < 1


def test_kv_cache_gives_the_logits_of_one_call() -> None:
    from gpt import GPT, Config, torch_attention

    torch.manual_seed(0)
    config = Config(vocab_size=11, context=48)
    model = GPT(config, torch_attention)
    tokens = torch.randint(11, (1, 40))
    shape = (1, config.context, config.nheads_kv, config.head_dim)
    cache = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(config.nlayers)]
    with torch.no_grad():
        whole = model(tokens)
        pieces = [tokens[:, :25], tokens[:, 25:26], tokens[:, 26:]]
        starts = (0, 25, 26)
        parts = [model(piece, cache, start) for piece, start in zip(pieces, starts, strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_generation_stays_within_the_context() -> None:
    from gpt import GPT, Config, anyattn_attention

    model = GPT(Config(vocab_size=5, context=16), anyattn_attention)
    prompt = torch.zeros(1, 10, dtype=torch.int64)
    assert model.generate(prompt, 100, 1.0, torch.Generator()).shape == (1, 6)


def test_short_text_is_refused(tmp_path: Path) -> None:
    from train import read_corpus

    text = tmp_path / "short.txt"
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(SystemExit, match="training needs at least 200"):
        read_corpus(text, 100)
