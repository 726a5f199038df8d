"""The Kubernetes manifests: rendering, KubeRay's schemas, and the rules that no schema states."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

REPOSITORY = Path(__file__).parents[1]
KUBERAY = REPOSITORY / "deploy" / "kuberay"
RUNS = [
    "overlays/cpu-demo",
    "overlays/h200-8x1/qwen3-4b",
    "overlays/h200-8x1/qwen3-8b",
    "overlays/multi-node",
]
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_UPGRADES = ("NewCluster", "None", "NewClusterWithIncrementalUpgrade")
_MAX_RAYJOB_NAME = 47  # and a RayService's: the operator appends six characters for the cluster, whose limit is 53
_DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_LABEL_PART = re.compile(r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_LABEL_PREFIX = re.compile(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
_UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def load(path: Path) -> list[Object]:
    """The documents of one YAML file; what is behind an anchor is copied, not shared."""
    return [json.loads(json.dumps(d)) for d in yaml.load_all(path.read_text(), Loader=_LOADER) if d]


def render(folder: Path | str) -> list[Object]:
    """The objects of a kustomization (relative to deploy/kuberay); skips where there is no Kustomize."""
    return _render(str(KUBERAY / folder))


@functools.cache
def _render(folder: str) -> list[Object]:
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", folder]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", folder]
    else:
        pytest.skip("neither kubectl nor kustomize is installed: overlays are not rendered")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, Loader=_LOADER))


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [o for o in objects if o["kind"] == kind]


def rayjob_of(folder: Path | str) -> Object:
    (job,) = of_kind(render(folder), "RayJob")
    return job


def crd_folder() -> Path:
    """Where KubeRay's schemas lie: $OPDLM_KUBERAY_CRDS, or shared/kuberay-crds beside the repository."""
    default = REPOSITORY.parent / "shared" / "kuberay-crds"
    folder = Path(os.environ.get("OPDLM_KUBERAY_CRDS", default))
    if not (folder / "ray.io_rayjobs.yaml").is_file():
        pytest.skip(f"no KubeRay schemas in {folder}; set OPDLM_KUBERAY_CRDS to a folder that holds them")
    return folder


@functools.cache
def schema_of(kind: str) -> Object:
    """The schema of KubeRay's v1 kind, such as RayJob, that refuses unknown fields."""
    file = crd_folder() / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"no schema of a {kind} in {file.parent}")
    (crd,) = load(file)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema: Object = _strict(version["schema"]["openAPIV3Schema"])
    return schema


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: _strict(value) for key, value in node.items() if key != "properties"}
    if "properties" in node:
        # a property may itself be called "properties", "default", ...: only its value is a schema
        strict["properties"] = {
            name: {"type": "object"} if name == "metadata" else _strict(value)
            for name, value in node["properties"].items()
        }
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            strict["additionalProperties"] = False
    return strict


def with_defaults(schema: Object, value: Any) -> Any:
    """`value` as the API server stores it: the schema's defaults filled in."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    filled = {name: p["default"] for name, p in properties.items() if "default" in p} | value
    rest = schema.get("additionalProperties")
    other = rest if isinstance(rest, dict) else {}
    return {name: with_defaults(properties.get(name, other), item) for name, item in filled.items()}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number: "500m", "4Gi"."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match and match[2] in _UNITS, f"not a quantity: {text!r}"
    return float(match[1]) * _UNITS[match[2]]


def cluster_of(owner: Object) -> Object:
    """The Ray cluster of a RayJob or a RayService."""
    field = "rayClusterConfig" if owner["kind"] == "RayService" else "rayClusterSpec"
    cluster: Object = owner["spec"][field]
    return cluster


def groups(owner: Object) -> dict[str, Object]:
    """Head and worker groups by name."""
    cluster = cluster_of(owner)
    return {"head": cluster["headGroupSpec"]} | {g["groupName"]: g for g in cluster["workerGroupSpecs"]}


def pods(job: Object) -> dict[str, Object]:
    """Every pod template that a RayJob brings: its groups' and the submitter's."""
    submitter = job["spec"].get("submitterPodTemplate")
    templates = {name: group["template"] for name, group in groups(job).items()}
    return templates | ({"submitter": submitter} if submitter else {})


def ray_container(group: Object) -> Object:
    container: Object = group["template"]["spec"]["containers"][0]
    return container


def broken_rules(job: Object) -> list[str]:
    """What the operator, or Kueue, would refuse or misread although the schema allows it."""
    return [*_job_rules(job), *_cluster_rules(job), *_kueue_rules(job)]


def broken_service_rules(service: Object) -> list[str]:
    """The same of a RayService."""
    return [*_service_rules(service), *_cluster_rules(service)]


def _service_rules(service: Object) -> Iterator[str]:
    name, spec = service["metadata"]["name"], service["spec"]
    if len(name) > _MAX_RAYJOB_NAME or not _DNS_LABEL.match(name):
        yield f"name {name!r} is no DNS label of at most {_MAX_RAYJOB_NAME} characters"
    if (upgrade := spec.get("upgradeStrategy", {}).get("type", "NewCluster")) not in _UPGRADES:
        yield f"upgradeStrategy {upgrade!r} is none of {_UPGRADES}"
    if cluster_of(service).get("authOptions", {}).get("mode") not in (None, "token", "disabled"):
        yield "a RayService has no Kubernetes tokens"
    port = yaml.safe_load(spec["serveConfigV2"]).get("http_options", {}).get("port", 8000)
    for group, of in groups(service).items():
        ports = {p["name"]: p["containerPort"] for p in ray_container(of)["ports"]}
        if ports.get("serve", 8000) != port:  # the operator's Service and probes go there
            yield f"{group}: port serve is not the {port} of http_options"


def _job_rules(job: Object) -> Iterator[str]:
    name, spec = job["metadata"]["name"], job["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    if len(name) > _MAX_RAYJOB_NAME or not _DNS_LABEL.match(name):
        yield f"name {name!r} is no DNS label of at most {_MAX_RAYJOB_NAME} characters"
    if mode not in _MODES:
        yield f"submissionMode {mode!r} is none of {_MODES}"
    if not spec.get("shutdownAfterJobFinishes"):
        if spec.get("suspend"):
            yield "suspend needs shutdownAfterJobFinishes"
        if spec.get("ttlSecondsAfterFinished", 0) > 0:
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    elif spec.get("deletionStrategy", {}).get("deletionRules"):
        yield "deletionRules exclude shutdownAfterJobFinishes"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} must be positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit must not be negative"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode has no backoffLimit"
    if mode == "SidecarMode":
        submitter = [f for f in ("submitterPodTemplate", "submitterConfig") if f in spec]
        yield from (f"SidecarMode has no {field}" for field in submitter)
        if _restart_policy(spec["rayClusterSpec"]["headGroupSpec"]) not in (None, "Never"):
            yield "SidecarMode wants restartPolicy Never in the head"
    environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML is no mapping"
    head_cpus = spec["rayClusterSpec"]["headGroupSpec"].get("rayStartParams", {}).get("num-cpus")
    if head_cpus == "0" and spec.get("entrypointNumCpus", 0) > 0 and mode == "SidecarMode":
        yield "entrypointNumCpus cannot be had on a head with num-cpus 0"


def _cluster_rules(owner: Object) -> Iterator[str]:
    cluster = cluster_of(owner)
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    names = [g["groupName"] for g in workers]
    if len(names) != len(set(names)):
        yield f"group names repeat: {names}"
    for name, group in {"head": head, **{g["groupName"]: g for g in workers}}.items():
        yield from _group_rules(name, group)
    for group in workers:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas outside minReplicas to maxReplicas"
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(n) for n in re.findall(r"\d+", cluster.get("rayVersion", "")))
        if version < (2, 52, 0):
            yield "authOptions token needs rayVersion 2.52.0 or later"
    yield from _autoscaler_rules(cluster, head, workers)


def _group_rules(name: str, group: Object) -> Iterator[str]:
    parameters = group.get("rayStartParams", {})
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
        yield f"{name}: resources stand in rayStartParams and in resources"
    if "labels" in parameters:
        yield f"{name}: labels stand in rayStartParams"
    if not all(isinstance(value, str) for value in parameters.values()):
        yield f"{name}: rayStartParams are not all strings"
    for key, value in group.get("labels", {}).items():
        prefix, _, label = key.rpartition("/")
        bad_key = not _LABEL_PART.match(label) or (prefix and not _LABEL_PREFIX.match(prefix))
        if bad_key or (value and not _LABEL_PART.match(value)):
            yield f"{name}: {key}={value} is no label"
    if not ray_container(group)["name"].startswith("ray-"):
        yield f"{name}: the first container is not Ray's"


def _autoscaler_rules(cluster: Object, head: Object, workers: list[Object]) -> Iterator[str]:
    variables = {v["name"]: v.get("value") for v in ray_container(head).get("env", [])}
    version = cluster.get("autoscalerOptions", {}).get("version")
    if not cluster.get("enableInTreeAutoscaling"):
        if version or variables.get("RAY_enable_autoscaler_v2") in ("1", "true"):
            yield "autoscaler settings without enableInTreeAutoscaling"
        return
    if version and "RAY_enable_autoscaler_v2" in variables:
        yield "the autoscaler's version is set twice"
    if version == "v2" and any(_restart_policy(g) not in (None, "Never") for g in [head, *workers]):
        yield "autoscaler v2 wants restartPolicy Never"
    if any(g.get("suspend") for g in workers):
        yield "an autoscaled group cannot be suspended"
    if head["template"]["spec"].get("automountServiceAccountToken") is False:
        yield "the autoscaler in the head has no Kubernetes token"


def _kueue_rules(job: Object) -> Iterator[str]:
    if KUEUE_LABEL not in job["metadata"].get("labels", {}):
        return
    if not job["spec"].get("suspend"):
        yield "a job for Kueue starts suspended"
    if not job["spec"].get("shutdownAfterJobFinishes"):
        yield "Kueue needs shutdownAfterJobFinishes"
    if job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling"):
        yield "Kueue does not admit autoscaled groups"


def _restart_policy(group: Object) -> str | None:
    policy: str | None = group["template"]["spec"].get("restartPolicy")
    return policy
