"""One controller a workflow: a live owner is respected, a dead one is not waited for."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from typing import Any

import pytest

from kvlab.db import engine, versions
from kvlab.db.errors import Held, LeaseLost
from kvlab.db.rows import Lease
from kvlab.db.store import Store
from kvlab.platform.controller import lease as controller_lease
from kvlab.platform.controller.inbox import Asked, Inbox, LeaseOver
from kvlab.platform.controller.lease import Heartbeat, claim, owner


@pytest.fixture
def store(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as opened:
        yield opened


@pytest.fixture
def workflow(store):
    return store.create_workflow("w", "", {}, [], 0.0)


def test_a_live_owner_is_not_pushed_aside(store, workflow):
    claim(store, workflow)
    said = f"is being run by host {socket.gethostname()}, pid {os.getpid()}, whose lease"
    with pytest.raises(Held, match=said):
        claim(store, workflow)


def test_a_dead_owner_is_not_waited_for(store, workflow):
    code = "from kvlab.platform.controller.lease import owner; print(owner())"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    old = store.claim(workflow, dead.stdout.strip(), 3600.0, time.time())
    began = time.monotonic()
    new = claim(store, workflow)
    assert time.monotonic() - began < 5.0
    with pytest.raises(LeaseLost), store.batch(old, time.time()):
        pass
    assert new.owner == owner()


def test_a_pid_used_again_is_another_process(store, workflow):
    host, pid, _ = owner().rsplit(":", 2)
    store.claim(workflow, f"{host}:{pid}:1", 3600.0, time.time())
    assert claim(store, workflow).owner == owner()


def test_the_same_pid_in_another_container_is_a_stranger(store, workflow):
    place, pid, _ = owner().rsplit(":", 2)
    other = place.rpartition("-")[0] + "-1"
    store.claim(workflow, f"{other}:{pid}:1", 3600.0, time.time())
    with pytest.raises(Held):
        store.claim(workflow, "me", 60.0, time.time())
    assert controller_lease._alive(f"{other}:{pid}:1") is None
    assert controller_lease._alive(owner()) is True


@pytest.mark.postgres
def test_hosts_whose_clocks_differ_respect_each_other(postgres_url, monkeypatch):
    versions.upgrade(postgres_url)
    with Store.open(postgres_url) as store:
        workflow = store.create_workflow("w", "", {}, [], 0.0)
        held = claim(store, workflow)
        ahead = time.time() + 3600.0
        monkeypatch.setattr(time, "time", lambda: ahead)
        with pytest.raises(Held):
            claim(store, workflow)
        assert store.renew(held, 60.0, store.clock()) is None


def test_a_stranger_is_waited_for(store, workflow):
    store.claim(workflow, "another-host:1:2", 0.3, time.time())
    assert claim(store, workflow).owner == owner()


def test_the_heartbeat_hears_requests_and_the_loss(store, workflow):
    inbox = Inbox()
    lease = claim(store, workflow)
    beat = Heartbeat(store, lease, inbox)
    try:
        store.request(workflow, "cancel")
        assert inbox.get(10.0) == [Asked("cancel")]
        store.claim(workflow, "thief", 60.0, time.time() + 3600.0)
        (message,) = inbox.get(10.0)
        assert isinstance(message, LeaseOver)
        assert isinstance(message.error, LeaseLost)
    finally:
        beat.close()


def test_an_outage_longer_than_the_lease_is_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(controller_lease, "TTL_SECONDS", 0.2)
    monkeypatch.setattr(controller_lease, "BEAT_SECONDS", 0.02)
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as store:
        workflow = store.create_workflow("w", "", {}, [], 0.0)
        inbox = Inbox()
        lease = claim(store, workflow)
        beat = Heartbeat(store, lease, inbox)
        try:
            # Another writer holds the file: nothing can be renewed.
            with sqlite3.connect(tmp_path / "kvlab.db", isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")
                assert inbox.get(1.0) == []
                other.execute("COMMIT")
            store.request(workflow, "stop")
            assert inbox.get(10.0) == [Asked("stop")]
            with store.batch(lease, time.time()):
                pass
        finally:
            beat.close()


def test_a_heartbeat_that_breaks_says_so(store, monkeypatch):
    monkeypatch.setattr(controller_lease, "BEAT_SECONDS", 0.02)
    inbox = Inbox()
    unbindable: Any = object()
    beat = Heartbeat(store, Lease(unbindable, 1, "me"), inbox)
    try:
        (message,) = inbox.get(10.0)
        assert isinstance(message, LeaseOver)
    finally:
        beat.close()
