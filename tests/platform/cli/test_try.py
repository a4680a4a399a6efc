"""`kvlab try`: what it cannot answer is refused in one line, with nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvlab.db.states import JobState
from kvlab.db.store import Store
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.registry import resolve
from kvlab.platform.cli.main import main
from kvlab.platform.home import Home


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


def test_it_answers_once_and_what_it_ran_can_be_run_again(folder: Path, tmp_path: Path) -> None:
    """As a new user would: an answer, the same command again, and the YAML by itself."""
    environment = {**os.environ, "KVLAB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def kvlab(*arguments: str) -> str:
        begin = "from kvlab.platform.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", begin, *arguments, "--cpus", "1", "--no-mlflow", "--json"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    asked = ("try", str(folder), "--device", "cpu", "--quick", "--budget", "50%", "--batch", "1")
    asked += ("--prompt", "32", "--generate", "4", "--sequences", "2", "--methods", "h2o,int8")
    first = json.loads(kvlab(*asked))
    points = {point["label"]: point for point in first["points"]}
    assert list(points) == ["full cache", "int8", "h2o"]
    assert points["full cache"]["divergence"]["kl"] == 0
    assert points["h2o"]["mark"] == "best"
    assert all(point["speed"] is not None for point in points.values())
    assert not any(point["predicted"] or point["failed"] for point in points.values())
    assert points["h2o"]["kv_bytes"] < points["full cache"]["kv_bytes"]
    assert json.loads(kvlab(*asked)) == first

    again = json.loads(kvlab("run", first["yaml"]))
    with Store.open(Home.find(tmp_path / "home").url, read_only=True) as store:
        jobs = store.load(again["workflow"]).jobs
    assert {job.state for job in jobs} == {JobState.DONE}
    scored = [job for job in jobs if job.kind != "benchmark"]
    assert len(scored) == 5
    assert all(job.reused_from is not None for job in scored)
