"""The data job's artifacts: exact, deterministic, split by document."""

import json

import pytest
from safetensors.torch import load_file

from kvlab.platform.data import corpus, holdout
from kvlab.platform.data.documents import DataError, plain
from kvlab.platform.jobs.local import run_cell

SPEC = {"format": "text", "tokenizer": {"bpe": 280}, "holdout": 0.2, "max_tokens": None}


def write(folder, count=60):
    folder.mkdir()
    written = [
        f"This is document {i}.\n" + f"Line of {i % 7}.\n" * (i % 9 + 1) for i in range(count)
    ]
    for i, text in enumerate(written):
        (folder / f"{i:03}.txt").write_text(text)
    return written


def run(tmp_path, name="out", **changes):
    source = {"kind": "folder", "path": str(tmp_path / "in"), "pattern": "*.txt"}
    spec = {"source": source, **SPEC, **changes}
    return run_cell("data", spec, {}, tmp_path / name)


def test_artifacts_hold_every_document_on_its_side(tmp_path):
    from tokenizers import Tokenizer

    written = write(tmp_path / "in")
    result = run(tmp_path)
    assert result == json.loads((tmp_path / "out" / "data.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for part, out in (("train", False), ("heldout", True)):
        expected = [t for t in written if holdout.held_out(plain(t), 0.2) == out]
        held = load_file(tmp_path / "out" / f"{part}.safetensors")
        starts = [0, *held["ends"].tolist()[:-1]]
        found = [
            tokenizer.decode(held["tokens"][a:b].tolist())
            for a, b in zip(starts, held["ends"].tolist(), strict=True)
        ]
        assert found == expected
        assert int(held["bytes"].sum()) == len("".join(expected).encode())
        assert result[f"{part}_documents"] == len(expected)
        assert result[f"{part}_tokens"] == held["tokens"].numel() == held["counts"].sum()
        read = corpus.load(tmp_path / "out", part)
        assert read.tokens.equal(held["tokens"])
        assert read.vocab_size == result["vocab_size"] <= 280


def test_documents_begin_as_the_tokenizer_has_it(tmp_path):
    from tokenizers import Tokenizer, processors

    write(tmp_path / "in")
    (tmp_path / "in" / "empty.txt").write_text("")
    bare = run(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    special = [("<s>", tokenizer.token_to_id("!"))]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = run(tmp_path, "begun", tokenizer={"path": str(tmp_path / "tokenizer.json")})
    assert (bare["beginning_of_text"], result["beginning_of_text"]) == (None, special[0][1])
    for part in ("train", "heldout"):
        before = load_file(tmp_path / "out" / f"{part}.safetensors")
        after = load_file(tmp_path / "begun" / f"{part}.safetensors")
        starts = [0, *after["ends"].tolist()[:-1]]
        assert (after["tokens"][starts] == special[0][1]).all()
        assert not after["counts"][starts].any()
        assert (after["bytes"][starts] == 0).all()
        assert after["tokens"][after["counts"]].equal(before["tokens"])


def test_two_runs_write_the_same_bytes(tmp_path):
    write(tmp_path / "in")
    run(tmp_path, "one")
    run(tmp_path, "two", tokenizer={"bpe": 280})
    for file in ("tokenizer.json", "data.json", "train.safetensors", "heldout.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path):
    write(tmp_path / "in")
    result = run(tmp_path, max_tokens=500)
    total = result["train_tokens"] + result["heldout_tokens"]
    assert 500 <= total < 700


def test_chat_prompts_are_masked_token_by_token(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(20)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "text", "path": str(tmp_path / "chat.jsonl")}
    spec = {**SPEC, "source": source, "format": "chat", "tokenizer": {"bytes": True}}
    result = run_cell("data", spec, {}, tmp_path / "out")
    held = load_file(tmp_path / "out" / "train.safetensors")
    said = bytes(held["tokens"][held["counts"]].tolist())
    assert len(said) == result["train_targets"] == 4 * result["train_documents"]


def test_all_documents_may_be_held_out(tmp_path):
    write(tmp_path / "in", count=3)
    result = run(tmp_path, holdout=1.0, tokenizer={"bytes": True})
    assert result["heldout_documents"] == 3
    assert result["train_documents"] == 0


def test_too_little_text_is_one_line(tmp_path):
    write(tmp_path / "in", count=1)
    with pytest.raises(DataError, match=r"too few to hold out 0\.2"):
        run(tmp_path)
    (tmp_path / "in" / "000.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        run(tmp_path)


def test_a_chat_without_an_assistant_is_refused(tmp_path):
    row = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    source = {"kind": "text", "path": str(tmp_path / "chat.jsonl")}
    spec = {**SPEC, "source": source, "format": "chat", "holdout": 0.0}
    with pytest.raises(DataError, match="no turn is by the assistant"):
        run_cell("data", spec, {}, tmp_path / "out")
