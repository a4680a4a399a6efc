"""`kvlab export`: a whole checkpoint folder that transformers loads, or nothing at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from kvlab.db.rows import NewJob
from kvlab.db.states import Cause, JobState
from kvlab.db.store import Store
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve
from kvlab.methods.store import save
from kvlab.platform.cli.main import main

TEXT = "ab  ba a\n\nb"


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes what a train job publishes under a method."""

    def make(method: object = "full_attention", name: str = "published") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(0)
        config = DecoderConfig(vocab_size=32, **llama(16, 2, 2, 1, 24))
        save(build(config, resolve(method)), folder)  # type: ignore[arg-type]
        letters = {
            letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
        }
        tokenizer = Tokenizer(models.BPE(letters, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Callable[..., Path]) -> Path:
    """A home whose one workflow has a trained cell, one that waits, and a score."""
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path))
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as store:
        cells = ("train[seed=0]", "train[seed=1]", "score")
        jobs = [
            NewJob(name, name.partition("[")[0], "noop", {}, {}, {}, (), name, {}) for name in cells
        ]
        number = store.create_workflow("w", "", {}, jobs, 1.0)
        lease = store.claim(number, "controller", 1e9, 1.0)
        ids = {job.name: job.id for job in store.load(number).jobs}
        for name, uri in ((cells[0], str(published())), (cells[2], None)):
            with store.batch(lease, 1.0) as batch:
                attempt = batch.start(ids[name], "worker")
                batch.end(ids[name], attempt, Cause.DONE, JobState.DONE, {}, uri)
    return tmp_path


@pytest.fixture
def export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """A function that runs the command: its exit code, and its one line."""

    def invoke(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kvlab", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = int(ended.value.code or 0)
        return code, (said.err if code else said.out).removesuffix("\n")

    return invoke


@torch.no_grad()
def test_a_job_is_exported_with_its_tokenizer(
    home: Path, export: Callable[..., tuple[int, str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvlab.methods.store import load

    out = home / "new" / "out"
    assert export("train[seed=0]", out) == (0, f"{out}: LlamaForCausalLM")
    ids = torch.randint(32, (1, 12))
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
    ours = load(home / "published").predictions(ids)[0]
    torch.testing.assert_close(theirs[:, :-1], ours[:, 1:], rtol=0, atol=1e-5)
    own = Tokenizer.from_file(str(home / "published" / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(out).encode(TEXT) == own.encode(TEXT).ids
    assert [path.name for path in (home / "new").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        ("full_attention", "LlamaForCausalLM"),
        ({"cross_layer": {"layers": "0_0"}}, "LCKVLlamaForCausalLM"),
    ],
)
def test_a_folder_is_exported_into_an_empty_one(
    method: object,
    architecture: str,
    published: Callable[..., Path],
    tmp_path: Path,
    export: Callable[..., tuple[int, str]],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert export(published(method), out) == (0, f"{out}: {architecture}")
    said = json.loads((out / "config.json").read_text())
    assert said["architectures"] == [architecture]
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("train", "'train' of workflow 1 has several cells, choose one: train[seed=0], train[se"),
        ("trian", "'trian' is neither a folder nor a job of workflow 1, which has train, score"),
        ("train[seed=1]", "'train[seed=1]' of workflow 1 (queued) has published no model"),
        ("score", "'score' of workflow 1 (done) has published no model"),
    ],
)
def test_jobs_without_a_model(
    model: str, error: str, home: Path, export: Callable[..., tuple[int, str]]
) -> None:
    code, said = export(model, home / "out", "--workflow", "w")
    assert (code, said.count("\n")) == (2, 0)
    assert said.startswith(error)
    assert not (home / "out").exists()


def test_a_job_is_that_of_the_newest_workflow_that_has_it_tries_last(
    home: Path, export: Callable[..., tuple[int, str]]
) -> None:
    with Store.open(f"sqlite:///{home}/kvlab.db") as store:
        for name, job in (("later", "other"), ("try-train-seed-0-0123abcd", "train[seed=0]")):
            jobs = [NewJob(job, job, "noop", {}, {}, {}, (), name, {})]
            store.create_workflow(name, "", {}, jobs, 1.0)
    assert export("train[seed=0]", home / "out") == (0, f"{home / 'out'}: LlamaForCausalLM")
    code, said = export("trian", home / "other")
    assert said == "'trian' is neither a folder nor a job of workflow 2, which has other"
    code, said = export("train[seed=0]", home / "other", "--workflow", "3")
    assert (code, said) == (2, "'train[seed=0]' of workflow 3 (queued) has published no model")


def test_neither_a_folder_nor_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    code, said = export("trained", tmp_path / "out")
    assert code == 2
    assert said.startswith(f"'trained' is no folder, and {tmp_path / 'home'} holds no workflow yet")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_left_behind(
    published: Callable[..., Path], tmp_path: Path, export: Callable[..., tuple[int, str]]
) -> None:
    token = published()
    block = published({"block_transformer": {"block_length": 2}}, "block")
    before = sorted(tmp_path.rglob("*"))
    code, said = export(token, block)
    assert (code, said) == (2, f"{block}: is there and not an empty folder: name a new one")
    code, said = export(token, token / "model.json" / "out")
    assert code == 2
    assert said.endswith("cannot be written (Not a directory)")
    code, said = export(block, tmp_path / "out", "--apply", "{int8: {}}")
    assert code == 2
    assert said.startswith("'int8' cannot be served")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_hugging_face_does_not_have_is_written_as_ours(
    published: Callable[..., Path], tmp_path: Path, export: Callable[..., tuple[int, str]]
) -> None:
    block = published({"block_transformer": {"block_length": 2}}, "block")
    out = tmp_path / "out"
    assert export(block, out) == (0, f"{out}: KvlabForCausalLM")
    said = json.loads((out / "config.json").read_text())
    assert said["kvlab"]["apply"] == {}
    assert "granularity" in said["kvlab"]["method"]
    assert (out / "model.safetensors").is_file()
