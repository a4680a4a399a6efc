"""Prompts: the person's own text, or token ids where no text can be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvlab import KvlabError
from kvlab.platform.data.tokenizer import make
from kvlab.platform.trying import text
from kvlab.platform.trying.subject import read

Write = Callable[..., Path]


def test_jsonl_says_what_its_text_is_called(tmp_path: Path) -> None:
    for name in ("text", "prompt"):
        (tmp_path / "in.jsonl").write_text(f'\n{{"{name}": "a"}}\n')
        assert text.column_of(tmp_path / "in.jsonl") == name
    (tmp_path / "in.txt").write_text("a")
    assert text.column_of(tmp_path / "in.txt") is None


@pytest.mark.parametrize("content", ['{"id": 1}', "[1]", "no json", '"text"'])
def test_jsonl_without_text(content: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(
        KvlabError, match="every line must be a JSON object with 'text' or 'prompt'"
    ):
        text.column_of(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    ("name", "content"), [("in.txt", " \n\n"), ("in.jsonl", ""), ("in.txt", "")]
)
def test_an_empty_file(name: str, content: str, tmp_path: Path, checkpoint: Write) -> None:
    (tmp_path / name).write_text(content)
    subject = read(checkpoint(), "tiny")
    with pytest.raises(KvlabError, match="is empty"):
        text.count(tmp_path / name, text.column_of(tmp_path / name), subject)


def test_tokens_are_counted_with_the_models_own_tokenizer(
    tmp_path: Path, checkpoint: Write
) -> None:
    (tmp_path / "in.txt").write_text("abc\nde")
    assert text.count(tmp_path / "in.txt", None, read(checkpoint(), "tiny")) == len("abc\nde") + 1


def test_token_ids_are_read_back_as_they_were_drawn(tmp_path: Path, checkpoint: Write) -> None:
    subject = read(checkpoint(tokenizer=False), "bare")
    assert not subject.tokenizer
    assert "no tokenizer.json" in subject.why
    data = text.token_source(tmp_path, subject, 5000, seed=1)
    lines = (tmp_path / "tokens.jsonl").read_text().splitlines()
    written = [json.loads(line)["text"] for line in lines]
    coder = make(data["tokenizer"], ())
    ids = [ids.tolist() for ids, _ in coder.encode(written)]
    assert [" ".join(map(str, each)) for each in ids] == written
    assert sum(map(len, ids)) == 5000
    assert coder.size == 257
    before = (tmp_path / "tokens.jsonl").stat().st_mtime_ns
    text.token_source(tmp_path, subject, 5000, seed=1)
    assert (tmp_path / "tokens.jsonl").stat().st_mtime_ns == before


def test_prompts_that_hold_no_two_facts_are_not_asked_about(checkpoint: Write) -> None:
    subject = read(checkpoint(), "tiny")
    assert text.pairs(subject, 64) == 0
    assert text.pairs(subject, 2048) == text.MOST_PAIRS
