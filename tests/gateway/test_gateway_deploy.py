"""The Kubernetes manifests and the image, as far as they can be checked without a cluster."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from server.config import load_config
from tests.made import ROOT

MANIFESTS = ROOT / "deploy" / "kubernetes" / "understudy.yaml"
NAMES = {"kind", "apiVersion", "metadata"}


def objects() -> dict[str, Any]:
    """The manifests by their kind: there is one of each."""
    found = list(yaml.safe_load_all(MANIFESTS.read_text(encoding="utf-8")))
    assert all(one.keys() >= NAMES and one["metadata"]["name"] == "understudy" for one in found)
    kinds = [one["kind"] for one in found]
    assert len(kinds) == len(set(kinds))
    return {one["kind"]: one for one in found}


def pod() -> Any:
    return objects()["Deployment"]["spec"]["template"]["spec"]


def containers() -> dict[str, Any]:
    return {one["name"]: one for one in pod()["containers"]}


def test_server_and_gateway_share_a_pod_with_probes_and_resources() -> None:
    assert containers().keys() == {"server", "gateway"}
    for one in containers().values():
        assert one["readinessProbe"] and one["livenessProbe"], one["name"]
        assert one["resources"]["requests"].keys() == {"cpu", "memory"} and one["resources"]["limits"]["memory"]


def test_nothing_runs_with_more_rights_than_it_needs() -> None:
    spec = pod()
    assert spec["securityContext"]["runAsNonRoot"] and spec["automountServiceAccountToken"] is False
    for one in [*spec["containers"], *spec["initContainers"]]:
        rights = one["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"] and rights["capabilities"] == {"drop": ["ALL"]}
    user = re.search(r"useradd --system --uid (\d+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert user and int(user[1]) == spec["securityContext"]["runAsUser"]


def test_names_that_are_used_exist() -> None:
    found, spec = objects(), pod()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    volumes = {one["name"] for one in spec["volumes"]}
    ports = {port["name"]: port["containerPort"] for one in spec["containers"] for port in one["ports"]}
    for one in [*spec["containers"], *spec["initContainers"]]:
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes if "volumeMounts" in one else True
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} <= ports.keys()
    assert {rule["port"] for entry in found["NetworkPolicy"]["spec"]["ingress"] for rule in entry["ports"]} <= ports.keys()
    assert ports == {"grpc": 50051, "http": 8080, "metrics": 9091}


def test_the_configuration_is_one_that_the_server_takes(tmp_path: Path) -> None:
    file = tmp_path / "understudy.toml"
    file.write_text(objects()["ConfigMap"]["data"]["understudy.toml"])
    config = load_config(str(file))
    assert config.auth.keys == "required" and config.server.host == "0.0.0.0"


def test_the_gateways_flags_exist_and_fit_into_the_pods_time(gateway_binary: Path) -> None:
    flags = dict(flag.removeprefix("--").split("=") for flag in containers()["gateway"]["args"])
    shown = subprocess.run([str(gateway_binary), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert flags.keys() <= set(re.findall(r"^  -([a-z-]+)", shown.stderr, flags=re.MULTILINE))
    seconds = sum(int(flags[name].removesuffix("s")) for name in ("drain-delay", "grace"))
    assert pod()["terminationGracePeriodSeconds"] > seconds + 30  # the server's own grace time


def test_the_image_holds_both_programs() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "make console gateway" in text and "/opt/understudy/bin/understudy-gateway" in text
    assert re.search(r"^EXPOSE .*\b50051\b.*\b8080\b", text, flags=re.MULTILINE)


def test_the_docs_name_every_flag(gateway_binary: Path) -> None:
    shown = subprocess.run([str(gateway_binary), "--help"], capture_output=True, text=True).stderr
    text = (ROOT / "docs" / "gateway.md").read_text(encoding="utf-8")
    missing = [flag for flag in re.findall(r"^  -([a-z-]+)", shown, flags=re.MULTILINE) if f"`--{flag}`" not in text]
    assert not missing
