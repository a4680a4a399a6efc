"""`kvlab try`: what it cannot answer is refused in one line, with nothing written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.registry import resolve
from kvlab.platform.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two layers and 128 positions, without a tokenizer."""
    made = tmp_path / "tiny"
    made.mkdir()
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=64, max_positions=128, **llama(32, 2, 4, 2, 48))
    write_checkpoint(build(config, resolve({})), made)
    return made


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A function that runs the command, which must exit with 2, and returns its one line."""
    home = tmp_path / "home"
    monkeypatch.setenv("KVLAB_HOME", str(home))

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["kvlab", "try", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert not home.exists()
        (line,) = said.err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "120%"), "--budget: must be above 0 % and at most 100 %, found 120%"),
        (("--budget", "0%"), "--budget: must be above 0 % and at most 100 %, found 0%"),
        (("--budget", "3%", "--prompt", "64"), "fewer than 5 have no room for sinks"),
        (("--prompt", "120", "--generate", "16"), "more than the model's 128 positions"),
        (("--methods", "pyramidkv,int8"), "--methods: pyramidkv divides what an eviction keeps"),
        (("--methods", "h2o,pyramidkv", "--quick"), "in compositions alone: leave out --quick"),
        (("--methods", "per_layer"), "--methods: unknown 'per_layer'"),
        (("--generate", "120"), "--generate: 120 tokens after a prompt of 16 or more"),
        (("--methods", "h20"), "--methods: unknown 'h20': did you mean 'h2o'?"),
        (("--methods", "snapkv", "--prompt", "64"), "--methods: snapkv at 10 %, 20 %, 50 %: keeps"),
        (("--device", "tpu"), "--device: must be cpu or cuda, found 'tpu'"),
        (("--memory", "much"), "--memory: must be bytes such as"),
        (("--prompts", "none.txt"), "--prompts: the model has no usable tokenizer"),
        (("--html", "no/such/report.html"), "there is no folder no/such"),
    ],
)
def test_a_question_that_cannot_be_answered(
    arguments: tuple[str, ...], said: str, folder: Path, refused: Callable[..., str]
) -> None:
    assert said in refused(folder, "--device", "cpu", *arguments)


def test_a_checkpoint_that_is_none(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused("./nowhere") == "checkpoint: no folder at './nowhere'"
    assert "'base' is no folder" in refused("base")
    (tmp_path / "empty").mkdir()
    assert "holds neither model.json nor config.json" in refused(tmp_path / "empty")


def test_a_checkpoint_of_unknown_maths(folder: Path, refused: Callable[..., str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "logit_softcap": 30.0}))
    assert "not supported: 'logit_softcap'" in refused(folder)
