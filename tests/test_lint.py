"""Every shipped artefact under the linter of its kind, offline."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.left_out import BIN

pytestmark = pytest.mark.lint

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "scripts" / "deploy"
K8S = DEPLOY / "k8s"
KEDA = ROOT.parent / "shared" / "keda.sh_scaledobjects.yaml"


def lint(*command: str | Path) -> str:
    """Run a linter and return what it printed; it has to be content."""
    done = subprocess.run(
        [str(BIN / command[0]), *map(str, command[1:])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shell_scripts() -> list[Path]:
    install = ROOT / "examples" / "systemd" / "install.sh"
    candidates = [p for p in (*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run", install) if p.is_file()]
    return [path for path in candidates if path.read_text(errors="replace").startswith("#!/bin/sh")]


def test_shell_scripts() -> None:
    """shellcheck has nothing to say, about the container's entry point above all."""
    scripts = shell_scripts()
    assert ROOT / "scripts" / "entrypoint" in scripts and len(scripts) > 5
    lint("shellcheck", "--external-sources", "--source-path", ROOT / "scripts", *scripts)


def test_dockerfile() -> None:
    """hadolint has nothing to say."""
    assert lint("hadolint", "--no-color", DEPLOY / "Dockerfile") == ""


def test_compose_file() -> None:
    """The compose specification knows every key."""
    files = (DEPLOY / "compose.yaml", ROOT / "examples" / "docker" / "compose.yaml")
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


def workflows() -> list[Path]:
    own = (ROOT / ".github" / "workflows").glob("*.yml")
    return [*sorted(own), ROOT / "examples" / "ci" / "rehearse.yml"]


def test_workflows() -> None:
    """The schemas of the hosting site know every key of workflows and of forms for issues."""
    site = ROOT / ".github"
    forms = [path for path in (site / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(workflows()) == 3 and len(forms) == 2
    lint("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows())
    lint("check-jsonschema", "--builtin-schema", "vendor.github-issue-forms", *forms)
    config = site / "ISSUE_TEMPLATE" / "config.yml"
    lint("check-jsonschema", "--builtin-schema", "vendor.github-issue-config", config)


def test_actions_are_those_that_were_looked_at() -> None:
    """A tag can be moved to other code, and a commit can't: each action is named by one, with the version."""
    used = [
        line.partition("uses: ")[2]
        for path in workflows()
        for line in path.read_text().splitlines()
        if "uses: " in line
    ]
    assert used and [each for each in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", each)] == []


def built(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(lint("kubectl", "kustomize", K8S / name)) if document]


def resources() -> Iterator[dict[str, Any]]:
    for path in sorted((K8S / "base").glob("*.yaml")):
        if path.name != "kustomization.yaml":
            yield yaml.safe_load(path.read_text())
    yield from built("base")
    yield from built("long-calls")


@pytest.mark.parametrize("version", ["1.30", "1.32", "1.34"])
def test_manifests(version: str) -> None:
    """The schema of Kubernetes finds no unknown key and no wrong type, in the overlay's result too."""
    validate = importlib.import_module("kubernetes_validate").validate
    seen = set()
    for resource in resources():
        if resource["apiVersion"].startswith("keda.sh"):
            continue
        validate(resource, version, strict=True)
        seen.add(resource["kind"])
    assert seen == {"Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy"}


def test_overlay_for_long_calls() -> None:
    """It changes grace and the kill timer together, and has KEDA in the HPA's place."""
    documents = {document["kind"]: document for document in built("long-calls")}
    assert set(documents) == {"Deployment", "PodDisruptionBudget", "ScaledObject", "NetworkPolicy"}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert environment["LASTCALL_GRACE"] == "14400"
    assert pod["terminationGracePeriodSeconds"] == 14430 == int(environment["LASTCALL_PLATFORM_GRACE"])
    assert environment["LASTCALL_HTTP"] == "0.0.0.0:8080", "the patch replaced the list"


def test_keda_in_an_overlay_with_other_names(tmp_path: Path) -> None:
    """namePrefix and namespace reach the target and the query; without a namespace nothing is built."""
    for part in ("base", "keda"):
        shutil.copytree(K8S / part, tmp_path / part)
    overlay = tmp_path / "overlay" / "kustomization.yaml"
    overlay.parent.mkdir()
    text = "namePrefix: a-\nresources: [../base]\ncomponents: [../keda]\n"
    overlay.write_text("namespace: voice\n" + text)
    documents = yaml.safe_load_all(lint("kubectl", "kustomize", overlay.parent))
    (scaled,) = [document for document in documents if document["kind"] == "ScaledObject"]
    assert scaled["metadata"]["name"] == scaled["spec"]["scaleTargetRef"]["name"] == "a-lastcall"
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    assert 'namespace="voice"' in query and 'pod=~"a-lastcall-[' in query and "$(" not in query
    overlay.write_text(text)
    with pytest.raises(AssertionError, match="LASTCALL_NAMESPACE"):
        lint("kubectl", "kustomize", overlay.parent)


@pytest.mark.skipif(not KEDA.is_file(), reason="KEDA's schema is not beside the checkout")
def test_scaled_object(tmp_path: Path) -> None:
    """KEDA's own schema, with unknown keys refused; the base's and the overlay's."""
    (version,) = [v for v in yaml.safe_load(KEDA.read_text())["spec"]["versions"] if v["name"] == "v1alpha1"]
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(closed(version["schema"]["openAPIV3Schema"])))
    overlaid = [document for document in built("long-calls") if document["kind"] == "ScaledObject"]
    for number, document in enumerate(
        [yaml.safe_load((K8S / "keda/scaledobject.yaml").read_text()), *overlaid]
    ):
        instance = tmp_path / f"{number}.json"
        instance.write_text(json.dumps(document))
        lint("check-jsonschema", "--schemafile", schema, instance)
    assert len(overlaid) == 1


def closed(schema: Any) -> Any:
    """Refuse unknown keys wherever the schema lists the known ones and does not allow others.

    Metadata is Kubernetes' own, and the schema of a resource leaves it open.
    """
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(result.get("properties"), dict) and result.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result
