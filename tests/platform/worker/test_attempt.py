"""An attempt without Ray: what it leaves, and how its ends are named."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys

import pytest

from kvlab import KvlabError
from kvlab.db.states import Cause
from kvlab.platform.home import Home
from kvlab.platform.jobs.context import Diverged, JobError, Stopped
from kvlab.platform.record.spool import records
from kvlab.platform.worker.attempt import Attempt
from kvlab.platform.worker.capture import Capture
from kvlab.platform.worker.causes import checked_result, classify
from kvlab.platform.worker.message import Assignment

NOOP = {"sleep": 0.0, "points": 3, "fail": None, "seed": 0}


@pytest.fixture
def home(tmp_path):
    found = Home.find(tmp_path / "home")
    found.create()
    return found


def attempt(home, spec=NOOP, kind="noop", number=1, **more):
    return Attempt(Assignment(1, 1, number, "cell", kind, spec, "abc", {}, **more), home)


def told(one):
    found, _ = records(one.report().data)
    return found


def test_points_then_the_end(home):
    one = attempt(home)
    one.run()
    *points, end = told(one)
    assert [point[1] for point in points] == [1, 2, 3]
    assert end[1]["cause"] == "done"
    assert end[1]["result"]["points"] == 3
    assert end[1]["artifact"] is None
    assert not one.report().running


@pytest.mark.parametrize(
    ("fail", "cause"),
    [
        ("nan", Cause.DIVERGED),
        ("oom", Cause.OUT_OF_MEMORY),
        ("user", Cause.USER_ERROR),
        ("disk", Cause.INFRASTRUCTURE),
    ],
)
def test_failures_have_their_cause(home, fail, cause):
    one = attempt(home, {**NOOP, "fail": fail})
    one.run()
    assert told(one)[-1][1]["cause"] == cause


def test_who_knows_less_than_was_acknowledged_is_told_all_it_lacks(home):
    one = attempt(home)
    one.run()
    whole = one.report()
    one.acknowledge(whole.size)
    assert one.report().data == b""
    again = one.report(10)
    assert (again.offset, again.data) == (10, whole.data[10:])


def test_an_unknown_kind_is_the_users(home):
    one = attempt(home, kind="nope")
    one.run()
    assert told(one)[-1][1]["cause"] == Cause.USER_ERROR


def test_a_stopped_job_ends_as_stopped(home):
    one = attempt(home, {**NOOP, "sleep": 60.0})
    one.stop()
    one.run()
    assert told(one)[-1][1]["cause"] == Cause.STOPPED


def test_nothing_is_left_but_the_spool(home):
    one = attempt(home)
    assert one._context.folder.is_dir()
    one.run()
    assert list((home.root / "work").iterdir()) == []
    assert not home.artifact("abc").exists()


def test_files_are_published_whole_and_the_first_publisher_wins(home):
    for number, text in ((1, "first"), (2, "second")):
        one = attempt(home, number=number)
        (one._context.folder / "model.json").write_text(json.dumps(text))
        one.run()
        assert told(one)[-1][1]["artifact"] == str(home.artifact("abc"))
    assert json.loads((home.artifact("abc") / "model.json").read_text()) == "first"
    assert list((home.root / "work").iterdir()) == []


def test_other_ranks_tell_their_end_alone(home):
    one = attempt(home, rank=1)
    one.run()
    assert told(one) == [["e", {"cause": "done"}]]
    assert list((home.root / "spool").iterdir()) == []


def test_a_spool_that_cannot_be_opened_is_the_machines(home):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        one = attempt(home)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    one.run()
    assert told(one)[-1][1]["cause"] == Cause.INFRASTRUCTURE


def test_an_end_that_does_not_fit_on_the_disk_is_told_all_the_same(home):
    # A limit on file size stands in for the full disk.
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        one = attempt(home)
        size = 3 * len('["p",1,1700000000000,{"value":0.0}]\n')
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        one.run()
        points = told(one)
        one.acknowledge(size)
        ((kind, end),) = told(one)
        right = len(points) == 3 and kind == "e" and end["cause"] == "done"
        os._exit(0 if right and one.report().size > size else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def logged(home):
    """Run an attempt as a worker does; return its log, None without one."""
    streams = sys.stdout, sys.stderr

    def run(kind, spec):
        one = Assignment(1, 1, 1, "a/b[c=1]", kind, spec, "abc", {})
        Attempt(one, home, Capture.install()).run()
        log = home.log(1, "a/b[c=1]", 1)
        assert log.parent == home.logs(1)
        return log.read_text() if log.exists() else None

    yield run
    sys.stdout, sys.stderr = streams


def test_output_and_tracebacks_go_to_the_log(logged):
    assert "Traceback" in logged("noop", {**NOOP, "fail": "user"})


def test_a_job_that_ran_has_a_log_that_says_how(logged, monkeypatch):
    assert logged("noop", NOOP) is None  # a file for each would slow thousands down
    monkeypatch.setattr("kvlab.platform.worker.attempt.SILENT", frozenset())
    begin, end = logged("noop", NOOP).splitlines()
    assert begin.endswith("a/b[c=1], attempt 1: noop begins")
    assert re.search(r": done after \d+\.\d s$", end)


def test_a_job_that_failed_says_so_last(logged):
    first, *_, last = logged("train", {}).splitlines()
    assert first.endswith("train begins")
    assert re.search(r": user_error after \d+\.\d s$", last)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (Stopped(), Cause.STOPPED),
        (Diverged("nan"), Cause.DIVERGED),
        (JobError("no"), Cause.USER_ERROR),
        (KvlabError("no"), Cause.USER_ERROR),
        (ValueError("a bug"), Cause.USER_ERROR),
        (SystemExit(3), Cause.USER_ERROR),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Cause.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), Cause.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "full"), Cause.INFRASTRUCTURE),
        (OSError(errno.EIO, "broken"), Cause.INFRASTRUCTURE),
        (OSError(errno.ENOMEM, "fork"), Cause.OUT_OF_MEMORY),
        (RuntimeError("No space left on device (os error 28)"), Cause.INFRASTRUCTURE),
        (FileNotFoundError(errno.ENOENT, "gone"), Cause.USER_ERROR),
    ],
)
def test_an_exception_tells_its_cause(error, cause):
    assert classify(error)[0] is cause


def test_the_cause_may_be_wrapped():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as disk:
            raise RuntimeError("the writer failed") from disk
    except RuntimeError as error:
        cause, message = classify(error)
    assert cause is Cause.INFRASTRUCTURE
    assert "No space left" in message
    assert "\n" not in message


def test_a_lost_peer_is_a_lost_node_only_in_a_gang():
    error = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")
    assert classify(error, workers=2)[0] is Cause.NODE_LOST
    assert classify(error, workers=1)[0] is Cause.USER_ERROR


def test_a_gang_that_does_not_meet_has_another_try():
    text = "The server socket has failed to listen on any local network address. EADDRINUSE"
    assert classify(RuntimeError(text), workers=2)[0] is Cause.INFRASTRUCTURE
    assert classify(RuntimeError(text), workers=1)[0] is Cause.USER_ERROR


@pytest.mark.parametrize("result", [None, 3, {"a": object()}])
def test_a_result_must_be_a_json_object(result):
    with pytest.raises(KvlabError):
        checked_result(result)
