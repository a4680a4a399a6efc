"""The spool: what was written is read, whole lines only, whatever stops the writer."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.platform.record.spool import (
    CHUNK,
    NoSpool,
    SpoolWriter,
    read_file,
    records,
    wait_unwritten,
)


@pytest.fixture
def spool(tmp_path):
    writer = SpoolWriter(tmp_path / "1-1.jsonl")
    yield writer
    writer.close()


def test_records_come_back_in_order(spool):
    spool.points(3, 1000, {"loss": 1, "rate": 0.5})
    spool.checkpoint(3, "there")
    spool.end({"cause": "done", "result": {"text": "a\nb, [c]"}})
    found, size = records(spool.read(0))
    assert found == [
        ["p", 3, 1000, {"loss": 1.0, "rate": 0.5}],
        ["c", 3, "there"],
        ["e", {"cause": "done", "result": {"text": "a\nb, [c]"}}],
    ]
    assert size == spool.size == len(spool.read(0))


def test_nan_and_infinity_survive(spool):
    spool.points(1, 0, {"a": math.nan, "b": math.inf})
    ((_, _, _, metrics),), _ = records(spool.read(0))
    assert math.isnan(metrics["a"])
    assert metrics["b"] == math.inf


@given(st.integers(0, 200))
def test_a_torn_line_is_not_there_yet(cut):
    data = b'["p",1,2,{"a":1.0}]\n["p",2,2,{"a":1.0}]\n'
    found, size = records(data[:cut])
    assert len(found) == data[:cut].count(b"\n")
    assert data[:size].endswith(b"\n") or size == 0
    rest, _ = records(data[size:])
    assert len(found) + len(rest) == 2


def test_a_record_that_does_not_fit_is_taken_back_whole(tmp_path):
    # A limit on file size stands in for the full disk: the write stops in the middle of a record.
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        writer = SpoolWriter(tmp_path / "full.jsonl")
        writer.points(1, 0, {"a": 1.0})
        try:
            writer.points(2, 0, {"a" * 200: 1.0})
        except OSError:
            os._exit(0 if writer.size == len(writer.read(0)) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(records((tmp_path / "full.jsonl").read_bytes())[0]) == 1


def test_a_file_is_read_in_chunks(spool):
    while spool.size <= CHUNK:
        spool.points(1, 0, {"k" * 1000: 1.0})
    first = read_file(spool.path, 0)
    assert len(first) == CHUNK
    assert len(first) + len(read_file(spool.path, CHUNK)) == spool.size
    assert read_file(spool.path.with_name("none"), 0) == b""


def test_other_ranks_keep_the_end_alone():
    spool = NoSpool()
    spool.points(1, 0, {"a": 1.0})
    spool.end({"cause": "done"})
    assert records(spool.read(0))[0] == [["e", {"cause": "done"}]]


def test_a_point_takes_fifty_microseconds_at_most(spool):
    times = []
    for step in range(1000):
        began = perf_counter()
        spool.points(step, 0, {"loss": 1.0, "rate": 0.1})
        times.append(perf_counter() - began)
    assert sorted(times)[500] < 50e-6


def test_a_record_longer_than_a_chunk_arrives_whole(spool):
    spool.points(1, 0, {"a": 1.0})
    spool.end({"cause": "done", "result": {"window_losses": [0.125] * (3 * CHUNK // 6)}})
    assert spool.size > 3 * CHUNK
    _, first = records(spool.read(0))
    for data in (spool.read(first), read_file(spool.path, first)):
        ((kind, end),), size = records(data)
        assert (kind, first + size) == ("e", spool.size)
        assert len(end["result"]["window_losses"]) == 3 * CHUNK // 6


def test_a_living_writer_is_waited_for(tmp_path):
    path = tmp_path / "1-1.jsonl"
    assert wait_unwritten(path, 0.0)
    code = (
        "import sys; from pathlib import Path; from kvlab.platform.record.spool import SpoolWriter;"
        "writer = SpoolWriter(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "open\n"
    assert not wait_unwritten(path, 0.1)
    writer.kill()
    assert wait_unwritten(path, 10.0)
    writer.communicate()
