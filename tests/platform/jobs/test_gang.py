"""Two real processes train what one would: DDP and FSDP2 over gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kvlab.methods.registry import resolve
from kvlab.platform.jobs.context import JobError, Stopped
from kvlab.platform.jobs.local import LocalContext, run_cell
from kvlab.platform.jobs.train.run import run
from kvlab.platform.jobs.uptrain.run import run as uptrain

SAME = [
    "ddp", "fsdp", "ddp-block", "fsdp-block", "ddp-uptrain", "fsdp-uptrain",
    "ddp-upward", "fsdp-upward", "fsdp-upward-recomputed",
]  # fmt: skip
WORKER = Path(__file__).with_name("gang_worker.py")


def free_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def gang(data, base, train_spec, block, tmp_path_factory):
    """Run every job of this file in one pair of processes; return name -> what rank 0 said."""
    folder = tmp_path_factory.mktemp("gang")
    masked = train_spec(method=block(4), accumulate=2, batch_size=2)
    lora = {
        **train_spec(method=block(4), learning_rate=1e-3),
        "lora": {"rank": 2, "alpha": 4.0, "targets": None, "quantize": None},
        "distill": {"weight": 0.5, "temperature": 2.0},
    }
    lora.pop("model")
    sandwich = {"cross_layer": {"layout": "sandwich_top", "kv_layers": 1}}
    upward = train_spec(method=resolve(sandwich).to_dict())
    specs = {
        "ddp": train_spec(),
        "fsdp": train_spec(parallel="fsdp"),
        "ddp-block": masked,
        "fsdp-block": {**masked, "parallel": "fsdp"},
        "ddp-uptrain": lora,
        "fsdp-uptrain": {**lora, "parallel": "fsdp"},
        "ddp-upward": upward,
        "fsdp-upward": {**upward, "parallel": "fsdp"},
        "fsdp-upward-recomputed": {**upward, "parallel": "fsdp", "gradient_checkpointing": True},
        "fsdp-stopped": train_spec(parallel="fsdp"),
        "fsdp-resumed": train_spec(parallel="fsdp"),
    }
    jobs = []
    for name, spec in specs.items():
        job = {"folder": str(folder / name), "spec": spec, "rendezvous": free_address()}
        if name in ("fsdp-stopped", "fsdp-resumed"):
            job["checkpoints"] = str(folder / "checkpoints")
        if name == "fsdp-stopped":
            job["stop_after"] = 1  # the ranks ask at steps 4 and 8
        jobs.append(job)
    # The last one starts from a checkpoint that one process left: see `alone`.
    jobs[-1]["checkpoints"] = str(folder / "alone")
    stopped = LocalContext(
        folder=folder, inputs={"data": data}, checkpoints=folder / "alone", stop_after=4
    )
    with pytest.raises(Stopped):
        run(train_spec(), stopped)
    ranks = []
    for rank in range(2):
        asked = {"rank": rank, "workers": 2, "jobs": jobs}
        asked["inputs"] = {"data": str(data), "from": str(base)}
        command = [sys.executable, str(WORKER), json.dumps(asked)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0]
    found = dict(zip(specs, map(json.loads, said[0].splitlines()), strict=True))
    return folder, specs, found


def alone(data, spec, folder, base=None):
    context = LocalContext(folder=folder, inputs={"data": data, "from": base})
    folder.mkdir(exist_ok=True)
    return (run if "model" in spec else uptrain)(spec, context), context.points


def difference(one, two):
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.mark.parametrize("name", SAME)
def test_two_workers_train_what_one_does(gang, data, base, tmp_path, name):
    folder, specs, found = gang
    result, points = alone(data, specs[name], tmp_path, base)
    said = {(key, step): value for key, step, value in found[name]["points"]}
    for key, step in points:
        if key in ("loss", "gradient_norm"):
            assert said[key, step] == pytest.approx(points[key, step], rel=1e-4)
    assert found[name]["result"]["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert found[name]["result"]["environment"]["workers"] == 2
    for key in ("parameters", "body_parameters", "tokens", "flops"):
        assert found[name]["result"][key] == result[key]
    assert difference(folder / name, tmp_path) < 2e-5
    assert not any((folder / f"{name}-other").iterdir())


def test_a_sharded_checkpoint_goes_on_in_one_process(gang, data, tmp_path):
    folder, specs, found = gang
    assert found["fsdp-stopped"]["result"] == "stopped"
    once, resumed = tmp_path / "once", tmp_path / "resumed"
    alone(data, specs["ddp"], once)
    run_cell("train", specs["ddp"], {"data": data}, resumed, checkpoints=folder / "checkpoints")
    assert difference(once, resumed) < 2e-5


def test_a_checkpoint_of_one_process_goes_on_sharded(gang, data, tmp_path):
    folder, specs, _ = gang
    alone(data, specs["ddp"], tmp_path)
    assert difference(folder / "fsdp-resumed", tmp_path) < 2e-5


def test_a_batch_that_cannot_be_shared_is_refused(data, train_spec, tmp_path):
    from kvlab.methods.build import build
    from kvlab.methods.decoder.config import DecoderConfig
    from kvlab.methods.registry import from_dict
    from kvlab.platform.jobs.training.gang import Gang
    from kvlab.platform.jobs.training.loop import Training, rows_of
    from kvlab.platform.jobs.training.objective import Objective

    spec = train_spec(batch_size=3)
    model = build(DecoderConfig.from_dict(spec["model"]["config"]), from_dict({}))
    context = LocalContext(folder=tmp_path, inputs={"data": data})
    rows = rows_of(model, spec, context)
    with pytest.raises(JobError, match="batch_size 3 cannot be shared by 2 workers"):
        Training(Objective(model), rows, spec, context, Gang(0, 2, "cpu"))


def test_a_gang_needs_an_address(data, train_spec, tmp_path):
    with pytest.raises(JobError, match="needs a rendezvous address"):
        run_cell("train", train_spec(), {"data": data}, tmp_path / "out", workers=2)
