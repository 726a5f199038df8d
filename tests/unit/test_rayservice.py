"""Servers on a Ray cluster that grows: the RayService's manifests, its Serve config, and the command it stands for."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from common.config.errors import ConfigError
from common.conversion import convert_folder
from deploy.commands import serve
from deploy.commands.serve import asked_in_file
from deploy.serving.options import Replicas
from tests.manifests import (
    KUBERAY,
    REPOSITORY,
    Object,
    broken_service_rules,
    cluster_of,
    groups,
    load,
    of_kind,
    quantity,
    ray_container,
    rayjob_of,
    render,
    schema_of,
    with_defaults,
)
from tests.models import tiny_qwen3

KEY = "0123456789abcdef"
TRAINED_BY = {
    "serving/rayservice/base": "overlays/cpu-demo",
    "serving/rayservice/h200": "overlays/h200-8x1/qwen3-4b",
}
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
each_service = pytest.mark.parametrize("folder", TRAINED_BY)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    arlm = tiny_qwen3(folder / "arlm", layers=1, max_length=8192)
    convert_folder(arlm, folder / "student", 4, "<|mask|>", torch.float32)
    (folder / "student" / "key").write_text(KEY)
    return folder / "student"


def service_of(folder: str) -> Object:
    (service,) = of_kind(render(folder), "RayService")
    return service


def serve_config(folder: str) -> Object:
    config: Object = yaml.safe_load(service_of(folder)["spec"]["serveConfigV2"])
    return config


def application_of(folder: str) -> Object:
    (application,) = serve_config(folder)["applications"]
    return application


def asked(folder: str, student: Path) -> Any:
    """What the command makes of the args, with a model and a key that are here."""
    return asked_in_file(application_of(folder)["args"] | {"model": student, "api_key_file": student / "key"})


def schema_errors(schema: Object, value: Object) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(with_defaults(schema, value))
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


@each_service
def test_service_fits_the_schema_and_the_rules(folder: str) -> None:
    assert broken_service_rules(service_of(folder)) == []
    assert schema_errors(schema_of("RayService"), service_of(folder)) == []


@each_service
def test_its_cluster_fits_the_schema(folder: str) -> None:
    schema = schema_of("RayCluster")["properties"]["spec"]
    cluster = cluster_of(service_of(folder))
    assert schema_errors(schema, cluster) == []
    cluster["headGroupSpec"]["rayStartParam"] = {}
    assert len(schema_errors(schema, cluster)) == 1, "a misspelt field is found"
    del cluster["headGroupSpec"]["rayStartParam"]


def test_rules_find_mistakes() -> None:
    (service,) = load(KUBERAY / "serving/rayservice/base/rayservice.yaml")
    service["metadata"]["name"] = "a" * 48
    service["spec"]["upgradeStrategy"]["type"] = "Rolling"
    service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace("port: 8000", "port: 9000")
    cluster_of(service)["authOptions"]["mode"] = "k8s"
    found = broken_service_rules(service)
    for complaint in ("no DNS label", "upgradeStrategy 'Rolling'", "no Kubernetes tokens", "head: port serve is not"):
        assert any(complaint in rule for rule in found), (complaint, found)


@each_service
def test_ray_serve_reads_the_config_and_finds_the_application(folder: str) -> None:
    pytest.importorskip("grpc_reflection")
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(serve_config(folder)).applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is serve.application
    assert application.route_prefix == "/", "clients ask for /v1/..."
    from deploy.serving import replicas

    assert [d.name for d in application.deployments] == [replicas.NAME], "settings of a deployment that there is"


@each_service
def test_options_are_those_of_the_command(folder: str, student: Path) -> None:
    args, read, config = application_of(folder)["args"], asked(folder, student), serve_config(folder)
    assert read.options.api_key == KEY and read.options.name == args["name"]
    assert read.options.slots == args["slots"], "the head, which has no GPU, must not choose them"
    assert read.options.host == config["http_options"]["host"] == "0.0.0.0"
    for group in groups(service_of(folder)).values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > read.drain_seconds


@each_service
def test_a_replica_fills_a_pod_and_pods_come_with_replicas(folder: str, student: Path) -> None:
    (deployment,) = application_of(folder)["deployments"]
    workers, replicas = groups(service_of(folder))["server"], asked(folder, student).replicas
    assert cluster_of(service_of(folder))["enableInTreeAutoscaling"] is True
    assert (workers["minReplicas"], workers["maxReplicas"]) == (replicas.least, replicas.most)
    assert replicas.least < replicas.most
    limits = {name: quantity(of) for name, of in ray_container(workers)["resources"]["limits"].items()}
    needs = deployment["ray_actor_options"]
    assert needs["num_cpus"] <= limits["cpu"]
    if (gpus := limits.get("nvidia.com/gpu", 0)) > 0:
        assert needs["num_gpus"] == gpus == 1
        assert workers["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
        assert limits["memory"] > 2 * 4e9 * 2, "weights of 4B parameters"
    else:
        assert 2 * needs["num_cpus"] > limits["cpu"]
    assert groups(service_of(folder))["head"]["rayStartParams"]["num-cpus"] == "0", "no replica on the head"


@each_service
def test_pods_are_restricted_and_read_what_the_run_left_behind(folder: str) -> None:
    args = application_of(folder)["args"]
    for name, group in groups(service_of(folder)).items():
        pod, container = group["template"]["spec"], ray_container(group)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert pod["automountServiceAccountToken"] is (name == "head"), "the autoscaler alone needs one"
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        gpus = "nvidia.com/gpu" in ray_container(groups(service_of(folder))["server"])["resources"]["limits"]
        assert container["image"] == f"opdlm:{VERSION}-{'cuda' if gpus else 'cpu'}"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        key = Path(args["api_key_file"])
        secret = volumes[mounts[str(key.parent)]["name"]]["secret"]["secretName"]
        documented = (REPOSITORY / "docs" / "serving.md").read_text()
        assert f"create secret generic {secret} --from-literal={key.name}=" in documented
        _, runs, run, rest = args["model"].split("/", 3)
        assert mounts[f"/{runs}"]["readOnly"] and mounts[str(key.parent)]["readOnly"]
        claims = {claim["metadata"]["name"] for claim in load(KUBERAY / "namespace" / "volumes.yaml")}
        assert volumes[mounts[f"/{runs}"]["name"]]["persistentVolumeClaim"]["claimName"] in claims
        command = rayjob_of(TRAINED_BY[folder])["spec"]["entrypoint"]
        assert f"/{run}.yaml" in command and f"--output_dir /{runs} " in f"{command} " and rest == "checkpoints/final"


@each_service
def test_requests_reach_the_pods_and_these_each_other(folder: str) -> None:
    objects = render(folder)
    (policy,) = of_kind(objects, "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    runs = load(KUBERAY / "namespace" / "networkpolicy.yaml")[0]["spec"]["podSelector"]["matchLabels"]
    among = {"from": [{"podSelector": {"matchLabels": selected}}]}
    assert among in policy["spec"]["ingress"] and {"to": among["from"]} in policy["spec"]["egress"]
    for group in groups(service_of(folder)).values():
        labels = group["template"]["metadata"]["labels"]
        assert selected.items() <= labels.items() and not runs.items() <= labels.items()
        ports = {port["name"]: port["containerPort"] for port in ray_container(group)["ports"]}
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert {ports["serve"], ports["metrics"], 8265} <= opened
        for monitor in of_kind(objects, "PodMonitor"):
            assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
            assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": None}, "args: there is no model"),
        ({"port": 9000}, "args: port: the config file has it itself"),
        ({"replica": 3}, "args: No such option: --replica"),
        ({"slots": 0}, "args: Invalid value for .--slots"),
        ({"replicas": "4:1"}, "--replicas: '4:1' is neither"),
        ({"host": "0.0.0.0"}, "--host: '0.0.0.0' can be reached"),
        ({"max_length": 9000}, "--max-length: 9000 is more than"),
        ({"model": "/nowhere"}, "MODEL: folder '/nowhere' does not exist"),
        ({"thinking": True}, "--thinking: the model"),
    ],
)
def test_wrong_args_are_refused(args: dict[str, Any], message: str, student: Path) -> None:
    given = {name: value for name, value in ({"model": student} | args).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        asked_in_file(given)


def test_args_have_the_types_of_yaml(student: Path) -> None:
    given = {"model": student, "prefix_cache": 0, "temperature": 0.5, "rule": "static", "timeout": 5, "queue": 7}
    options = asked_in_file(given).options
    assert (options.prefix_cache, options.temperature, options.timeout, options.queue) == (0, 0.5, 5.0, 7)
    assert options.decoding[0] == "static" and options.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "least", "most"), [("1", 1, 1), ("4", 4, 4), ("1:4", 1, 4), ("3:3", 3, 3), ("1024", 1024, 1024)]
)
def test_replicas(text: str, least: int, most: int) -> None:
    assert Replicas.parsed(text) == Replicas(least, most)


@pytest.mark.parametrize("text", ["0", "-1", "0:4", "4:1", "1:", ":4", "1:2:3", "1.5", "many", "", "1025", "1:1025"])
def test_no_replicas(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--replicas: .* is neither a number nor LEAST:MOST"):
        Replicas.parsed(text)
