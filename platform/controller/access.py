"""Connecting to a Ray cluster that is there: never to one that runs anybody's code."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from kvlab import KvlabError
from kvlab.platform.controller.pool import NAMESPACE

PROBE_SECONDS = 10.0
PROBE = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""A harmless question to a cluster's head; all its fields may be left out."""

CURE = "start it with RAY_AUTH_MODE=token, and set that and RAY_AUTH_TOKEN here"


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster.

    Raises:
        KvlabError: it does not answer, or other machines reach it and it takes anybody's jobs.
    """
    refuse_open_cluster(address)
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise KvlabError(
            f"no Ray cluster at {address} ({reason}): check --address and RAY_AUTH_TOKEN"
        ) from error
    try:
        _check_token(address)
        yield
    finally:
        ray.shutdown()


def refuse_open_cluster(address: str) -> None:
    """Raise a KvlabError when an address is on other machines and no token is set here."""
    host = address.removeprefix("ray://").rpartition(":")[0] or address
    # What `auto` stands for is known, and checked, once connected.
    if os.environ.get("RAY_AUTH_MODE") == "token" or host == "auto" or _loopback(host):
        return
    raise KvlabError(
        f"the cluster at {address} is not on this machine, and without a token it would run "
        f"anybody's code: {CURE}"
    )


def _check_token(address: str) -> None:
    """Raise a KvlabError unless the connected cluster is out of reach, or refuses a wrong token.

    That the environment here names a token says nothing: a cluster without one ignores it.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    if all(_loopback(node["NodeManagerAddress"]) for node in nodes if node["Alive"]):
        return
    head = ray.get_runtime_context().gcs_address
    if _takes_anybody(head):
        raise KvlabError(
            f"the cluster at {address} ({head}) can be reached from other machines and answers "
            f"without the right token, so it would run anybody's code: {CURE}"
        )


def _takes_anybody(head: str) -> bool:
    """Whether a cluster's head answers somebody with a made-up token."""
    import grpc  # type: ignore[import-untyped]

    wrong = (("authorization", f"Bearer {secrets.token_hex(32)}"),)
    with grpc.insecure_channel(head, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(PROBE)(b"", metadata=wrong, timeout=PROBE_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise KvlabError(
                f"the cluster's head {head} cannot be asked whether it wants a token "
                f"({error.code().name}): run kvlab where it can be reached"
            ) from error
    return True


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
