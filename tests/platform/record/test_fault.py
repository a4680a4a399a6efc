"""The fuse: it burns where and when it was told to, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from kvlab.platform.record.fault import POINTS, Fuse


def test_nothing_is_armed_by_default():
    assert Fuse({}).name == ""


def test_it_counts():
    fuse = Fuse({"KVLAB_FAULT": "end.after_commit:3"})
    assert [fuse.burn() for _ in range(3)] == [False, False, True]


def test_a_mark_lets_one_process_die(tmp_path):
    told = {"KVLAB_FAULT": "spool.before_end", "KVLAB_FAULT_MARK": str(tmp_path / "mark")}
    assert Fuse(told).burn()
    assert not Fuse(told).burn()


def test_the_process_is_killed_outright():
    code = f"from kvlab.platform.record import fault; fault.point({POINTS[0]!r}); print('alive')"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KVLAB_FAULT": POINTS[0]},
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == b""
