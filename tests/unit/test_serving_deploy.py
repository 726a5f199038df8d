"""The server on a cluster: manifests, dashboard and alerts, checked without one."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from deploy.cli import app
from deploy.serving.grafana import FILE, dashboard, queries
from deploy.serving.metrics import ServingMetrics
from tests.manifests import KUBERAY, REPOSITORY, Object, load, of_kind, quantity, rayjob_of, render, schema_of
from tests.prometheus import check_alerts, check_layout, check_queries, expressions

OVERLAYS = ["serving/base", "serving/h200"]
TRAINED_BY = {"serving/base": "overlays/cpu-demo", "serving/h200": "overlays/h200-8x1/qwen3-4b"}
RULES = FILE.parent / "serve-rules.yaml"
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def one(objects: list[Object], kind: str) -> Object:
    (found,) = of_kind(objects, kind)
    return found


def pod_of(deployment: Object) -> Object:
    pod: Object = deployment["spec"]["template"]["spec"]
    return pod


def container_of(deployment: Object) -> Object:
    (container,) = pod_of(deployment)["containers"]
    return container


def serve_options(deployment: Object) -> dict[str, Any]:
    """What the command line makes of the container's arguments; it refuses what it does not know."""
    commands: Any = typer.main.get_command(app)
    context = commands.commands["serve"].make_context("serve", list(container_of(deployment)["args"]))
    options: dict[str, Any] = context.params
    return options


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_fit_the_schema(folder: str) -> None:
    deployment = one(render(folder), "Deployment")
    groups = schema_of("RayJob")["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    pod_schema = groups["headGroupSpec"]["properties"]["template"]  # a pod is a pod
    errors = jsonschema.Draft202012Validator(pod_schema).iter_errors(deployment["spec"]["template"])
    assert [f"{error.json_path}: {error.message[:200]}" for error in errors] == []


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_are_restricted(folder: str) -> None:
    deployment = one(render(folder), "Deployment")
    security = pod_of(deployment)["securityContext"]
    assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
    container = container_of(deployment)
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert not pod_of(deployment)["automountServiceAccountToken"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod_of(deployment)["volumes"]}
    assert all(mount["readOnly"] for mount in mounts.values())


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_command_serves_what_the_run_beside_it_leaves_behind(folder: str) -> None:
    deployment = one(render(folder), "Deployment")
    options = serve_options(deployment)
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(deployment)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(deployment)["volumes"]}
    _, runs, name, rest = options["model"].split("/", 3)
    assert rest == "checkpoints/final"
    assert f"name: {name}\n" in (REPOSITORY / "deploy" / "presets" / f"{name}.yaml").read_text()
    claims = {claim["metadata"]["name"] for claim in load(KUBERAY / "namespace" / "volumes.yaml")}
    assert volumes[mounts[f"/{runs}"]]["persistentVolumeClaim"]["claimName"] in claims
    command = rayjob_of(TRAINED_BY[folder])["spec"]["entrypoint"]
    assert f"/{name}.yaml" in command and f"--output_dir /{runs} " in f"{command} "
    key = Path(options["api_key_file"])
    secret = volumes[mounts[str(key.parent)]]["secret"]["secretName"]
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    assert f"create secret generic {secret} --from-literal={key.name}=" in text
    assert options["host"] == "0.0.0.0"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_requests_reach_the_server_and_may_end(folder: str) -> None:
    objects = render(folder)
    deployment, service, policy = (one(objects, kind) for kind in ("Deployment", "Service", "NetworkPolicy"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    runs = load(KUBERAY / "namespace" / "networkpolicy.yaml")[0]["spec"]["podSelector"]["matchLabels"]
    assert not runs.items() <= labels.items(), "the server must not reach the pods of runs"
    container, options = container_of(deployment), serve_options(deployment)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == options["port"]
    assert [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]] == [options["port"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod_of(deployment)["terminationGracePeriodSeconds"] > sleep + options["drain"]
    image = "cuda" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
    assert container["image"] == f"opdlm:{VERSION}-serve-{image}"
    assert f"--target serve -t {container['image']}" in (REPOSITORY / "deploy/docker/Dockerfile").read_text()


def test_gpu_replicas_are_replaced_in_place_and_watched() -> None:
    objects = render("serving/h200")
    deployment, budget = one(objects, "Deployment"), one(objects, "PodDisruptionBudget")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert deployment["spec"]["replicas"] > budget["spec"]["maxUnavailable"]
    assert (
        budget["spec"]["selector"]["matchLabels"].items()
        <= deployment["spec"]["template"]["metadata"]["labels"].items()
    )
    limits = container_of(deployment)["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and pod_of(deployment)["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert quantity(limits["memory"]) > 4 * 4e9 * 2, "weights of 4B parameters, read again beside themselves"
    monitor, grafana = one(objects, "PodMonitor"), one(objects, "ConfigMap")
    assert one(objects, "PrometheusRule")["metadata"]["name"] == "opdlm-serve"
    assert (
        monitor["spec"]["selector"]["matchLabels"].items()
        <= deployment["spec"]["template"]["metadata"]["labels"].items()
    )
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "http"
    assert grafana["metadata"]["labels"] == {"grafana_dashboard": "1"} and list(grafana["data"]) == [FILE.name]


def names() -> set[str]:
    """Of all series of a server, but for those that say when a counter was made."""
    found = set()
    for metric in ServingMetrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        found |= {metric.name + suffix for suffix in suffixes}
    return found


def used(expression: str) -> set[str]:
    return set(re.findall(r"\bopdlm_serve_\w+", expression))


def test_committed_dashboard_is_up_to_date() -> None:
    assert json.loads(FILE.read_text()) == dashboard(), "run `python -m deploy.serving.grafana` and commit the file"


def test_every_metric_has_a_panel() -> None:
    shown = set.union(*(used(query) for query in queries()))
    assert shown == {name for name in names() if not name.endswith(("_sum", "_count"))}
    check_layout(dashboard())


def test_queries_are_valid_promql(tmp_path: Path) -> None:
    check_queries([query.replace("$pod", ".*") for query in queries()], tmp_path)


def test_alerts_fire_on_what_they_are_about(tmp_path: Path) -> None:
    assert check_alerts(RULES, tmp_path) == set(), "every alert has a test"
    metrics = set.union(*(used(expression) for expression in expressions(RULES)))
    assert metrics and metrics <= names()


def test_documentation_names_what_exists() -> None:
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    for path in re.findall(r"deploy/[\w./-]+", text):
        assert (REPOSITORY / path).exists(), path
    applies = re.findall(r"kubectl apply.*", text)
    assert applies and all("--server-side" in line for line in applies)
    assert all(f"alert: {name}" in RULES.read_text() for name in re.findall(r"\bOpdlm\w+", text))
    shown = re.findall(r"\bopdlm_serve_\w+[a-z]", text)
    assert set(shown) <= names()
