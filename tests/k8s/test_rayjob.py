"""The manifest fits KubeRay's schema, field by field, and what it refers to exists."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Path(__file__).with_name("rayjob-v1.schema.json.gz")

CONFIG_MAP = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "data"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "ConfigMap"},
        "metadata": {"type": "object", "required": ["name"]},
        "data": {
            "type": "object",
            "propertyNames": {"pattern": "^[-._a-zA-Z0-9]+$"},
            "additionalProperties": {"type": "string"},
        },
    },
}

VOLUME_CLAIM = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "PersistentVolumeClaim"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["accessModes", "resources"],
            "additionalProperties": False,
            "properties": {
                "accessModes": {"const": ["ReadWriteMany"]},
                "storageClassName": {"type": "string"},
                "resources": {
                    "type": "object",
                    "required": ["requests"],
                    "properties": {"requests": {"type": "object", "required": ["storage"]}},
                },
            },
        },
    },
}


def strict(schema: Any) -> Any:
    """Refuse unknown fields, as `kubectl --validate=strict` does, and read int-or-string."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load_all((ROOT / "k8s/rayjob.yaml").read_text())
    return {document["kind"]: document for document in loaded}


@pytest.fixture(scope="module")
def rayjob_schema() -> dict[str, Any]:
    schema: dict[str, Any] = strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    # The resource's own metadata is Kubernetes', which a custom resource definition leaves open.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def pod_specs(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        job["spec"]["submitterPodTemplate"]["spec"],
        *(group["template"]["spec"] for group in groups),
    ]


def test_the_manifest_is_valid(
    documents: dict[str, dict[str, Any]], rayjob_schema: dict[str, Any]
) -> None:
    assert set(documents) == {"ConfigMap", "PersistentVolumeClaim", "RayJob"}
    jsonschema.validate(documents["ConfigMap"], CONFIG_MAP)
    jsonschema.validate(documents["PersistentVolumeClaim"], VOLUME_CLAIM)
    jsonschema.validate(documents["RayJob"], rayjob_schema)


def test_a_field_that_kuberay_does_not_know_is_found(
    documents: dict[str, dict[str, Any]], rayjob_schema: dict[str, Any]
) -> None:
    planted = json.loads(json.dumps(documents["RayJob"]))
    pod_specs(planted)[1]["containers"][0]["securityContexts"] = {}
    with pytest.raises(jsonschema.ValidationError, match="securityContexts"):
        jsonschema.validate(planted, rayjob_schema)


def test_nobody_runs_as_root_and_callers_need_a_token(
    documents: dict[str, dict[str, Any]],
) -> None:
    job = documents["RayJob"]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pod_specs(job):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"]


def test_names_that_refer_to_each_other_agree(documents: dict[str, dict[str, Any]]) -> None:
    job, name = documents["RayJob"], documents["ConfigMap"]["metadata"]["name"]
    pins = (ROOT / "constraints-cpu.txt").read_text()
    assert f"\nray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in pins
    claim, mounted = documents["PersistentVolumeClaim"]["metadata"]["name"], 0
    for pod in pod_specs(job):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        assert all(
            volume["persistentVolumeClaim"]["claimName"] == claim
            for volume in volumes.values()
            if "persistentVolumeClaim" in volume
        )
        for mount in pod["containers"][0].get("volumeMounts", []):
            source = volumes[mount["name"]].get("configMap")
            if source:
                assert source["name"] == name
                assert mount["mountPath"] in job["spec"]["entrypoint"]
                mounted += 1
    assert mounted == 1


def test_settings_given_to_containers_are_read_by_kvlab(
    documents: dict[str, dict[str, Any]],
) -> None:
    code = "".join(file.read_text() for file in (ROOT / "platform").rglob("*.py"))
    named = re.findall(r"KVLAB_\w+", (ROOT / "k8s/image/Dockerfile").read_text())
    for pod in pod_specs(documents["RayJob"]):
        named += [one["name"] for one in pod["containers"][0].get("env", [])]
    assert {"KVLAB_HOME", "KVLAB_DATABASE"} <= set(named)
    assert all(f'"{name}"' in code for name in named)


def test_the_workflow_it_carries_is_valid(
    documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    for file, text in documents["ConfigMap"]["data"].items():
        assert f"/{file} " in documents["RayJob"]["spec"]["entrypoint"]
        (tmp_path / file).write_text(text)
        done = subprocess.run(
            [Path(sys.executable).with_name("kvlab"), "validate", tmp_path / file],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr + done.stdout


def test_the_image_copies_what_the_build_needs() -> None:
    text = (ROOT / "k8s/image/Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert {"src", "platform", "methods", "kernels", "db", "pyproject.toml"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    assert re.search(r"^USER 1000$", text, flags=re.MULTILINE)
