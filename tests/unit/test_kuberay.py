"""The Kubernetes manifests, checked without a cluster: schemas, the operator's rules, names, placement."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from common.config.file import PRESETS, load_config
from common.config.run import RunConfig
from deploy.cli import app
from deploy.placement import Process, plan
from tests.manifests import (
    KUBERAY,
    KUEUE_LABEL,
    REPOSITORY,
    RUNS,
    Object,
    broken_rules,
    groups,
    load,
    of_kind,
    pods,
    quantity,
    ray_container,
    rayjob_of,
    render,
    schema_of,
    with_defaults,
)

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GPU_BYTES = {"NVIDIA-H200": 141e9}
ROLES = ("rollout", "teacher", "learner")


def train_options() -> set[str]:
    """Options of `opdlm train` that are not overrides of the config."""
    commands: Any = typer.main.get_command(app)
    return {name for parameter in commands.commands["train"].params for name in parameter.opts}


def entrypoint_of(job: Object) -> tuple[Path, list[str], list[str]]:
    """The preset, the config overrides and the other options of a job's command."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["opdlm", "train"]
    preset = PRESETS / Path(words[2]).name
    options = dict(zip(words[3::2], words[4::2], strict=True))
    overrides = {k: v for k, v in options.items() if k not in train_options() | {"--resume"}}
    others = [k for k in options if k not in overrides]
    return preset, [word for pair in overrides.items() for word in pair], others


def config_of(job: Object) -> RunConfig:
    preset, overrides, _ = entrypoint_of(job)
    return load_config(str(preset), overrides)


def schema_errors(job: Object) -> list[str]:
    schema = schema_of("RayJob")
    found = jsonschema.Draft202012Validator(schema).iter_errors(with_defaults(schema, job))
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def presets_of(objects: list[Object]) -> Object:
    (presets,) = [o for o in of_kind(objects, "ConfigMap") if o["metadata"]["name"].startswith("opdlm-presets")]
    return presets


def base_job() -> Object:
    (job,) = load(KUBERAY / "base" / "rayjob.yaml")
    return job


def test_base_fits_the_schema_and_the_rules() -> None:
    job = base_job()
    assert broken_rules(job) == []
    assert schema_errors(job) == []
    assert tuple(groups(job)) == ("head", *ROLES), "the overlays address the groups by this order"


@pytest.mark.parametrize("folder", RUNS)
def test_run_fits_the_schema_and_the_rules(folder: str) -> None:
    job = rayjob_of(folder)
    assert broken_rules(job) == []
    assert schema_errors(job) == []


@pytest.mark.parametrize("folder", RUNS)
def test_a_lost_worker_pod_is_replaced_and_waited_for(folder: str) -> None:
    """KubeRay makes a new pod where `replicas` asks for it; the run waits longer for it than an autoscaler takes."""
    job = rayjob_of(folder)
    assert config_of(job).ray.placement_timeout_s >= 1800
    assert config_of(job).recovery.restarts > 0
    for role in ROLES:
        assert groups(job)[role]["template"]["spec"]["restartPolicy"] == "Never"
        assert groups(job)[role]["replicas"] >= 1


def test_schema_refuses_unknown_fields_and_wrong_types() -> None:
    def container(job: Object) -> Object:
        return ray_container(groups(job)["learner"])

    mistakes: list[Callable[[Object], Any]] = [
        lambda job: job["spec"].update(shutDownAfterJobFinishes=True),
        lambda job: job["spec"].update(backoffLimit="three"),
        lambda job: cluster(job).pop("headGroupSpec"),
        lambda job: cluster(job)["authOptions"].update(mode="tokens"),
        lambda job: container(job)["securityContext"].update(readOnlyRootFileSystem=True),
        lambda job: container(job)["resources"].update(limit={"cpu": "1"}),
    ]
    for mistake in mistakes:
        job = base_job()
        mistake(job)
        assert len(schema_errors(job)) == 1


def cluster(job: Object) -> Any:
    return job["spec"]["rayClusterSpec"]


def set_autoscaled(job: Object, **pod: Any) -> None:
    cluster(job)["enableInTreeAutoscaling"] = True
    cluster(job)["autoscalerOptions"] = {"version": "v2"}
    cluster(job)["headGroupSpec"]["template"]["spec"] |= {"automountServiceAccountToken": True}
    cluster(job)["workerGroupSpecs"][0]["template"]["spec"] |= pod


MISTAKES: dict[str, Callable[[Object], Any]] = {
    "is no DNS label": lambda job: job["metadata"].update(name="a" * 48),
    "submissionMode": lambda job: job["spec"].update(submissionMode="K8SJobMode"),
    "suspend needs": lambda job: job["spec"].update(suspend=True, shutdownAfterJobFinishes=False),
    "ttlSecondsAfterFinished": lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
    "must be positive": lambda job: job["spec"].update(activeDeadlineSeconds=0),
    "InteractiveMode": lambda job: job["spec"].update(submissionMode="InteractiveMode"),
    "SidecarMode has no": lambda job: job["spec"].update(submissionMode="SidecarMode"),
    "no mapping": lambda job: job["spec"].update(runtimeEnvYAML="- a"),
    "resources stand": lambda job: groups(job)["head"].update(resources={"CPU": "1"}),
    "labels stand": lambda job: groups(job)["head"]["rayStartParams"].update(labels="a=b"),
    "not all strings": lambda job: groups(job)["head"]["rayStartParams"].update({"num-cpus": 0}),
    "is no label": lambda job: groups(job)["learner"].update(labels={"role": "the learner"}),
    "replicas outside": lambda job: groups(job)["learner"].update(replicas=3),
    "group names repeat": lambda job: groups(job)["learner"].update(groupName="teacher"),
    "rayVersion": lambda job: cluster(job).pop("rayVersion"),
    "restartPolicy Never": lambda job: set_autoscaled(job, restartPolicy="Always"),
    "without enableInTreeAutoscaling": lambda job: cluster(job).update(autoscalerOptions={"version": "v2"}),
    "no Kubernetes token": lambda job: cluster(job).update(enableInTreeAutoscaling=True),
    "starts suspended": lambda job: job["metadata"]["labels"].update({KUEUE_LABEL: "q"}),
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_rules_find_mistakes(complaint: str) -> None:
    job = base_job()
    MISTAKES[complaint](job)
    assert any(complaint in rule for rule in broken_rules(job)), broken_rules(job)


@pytest.mark.parametrize("folder", RUNS)
def test_pods_are_restricted(folder: str) -> None:
    job = rayjob_of(folder)
    autoscaled = job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    assert set(pods(job)) == {"head", "submitter", *ROLES}
    for name, pod in pods(job).items():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is (autoscaled and name == "head")
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("folder", RUNS)
def test_names_resolve(folder: str) -> None:
    objects = render(folder)
    presets = presets_of(objects)
    claims = {d["metadata"]["name"] for d in load(KUBERAY / "namespace" / "volumes.yaml")}
    assert re.fullmatch(r"opdlm-presets-[a-z0-9]{10}", presets["metadata"]["name"])
    assert {o["metadata"].get("namespace", "opdlm") for o in objects} == {"opdlm"}
    for group in groups(rayjob_of(folder)).values():
        pod = group["template"]["spec"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert {m["name"] for m in ray_container(group)["volumeMounts"]} == set(volumes)
        assert volumes["presets"]["configMap"]["name"] == presets["metadata"]["name"]
        claimed = [v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v]
        assert {claim["claimName"] for claim in claimed} == claims


@pytest.mark.parametrize("folder", RUNS)
def test_command_is_a_run_that_can_resume(folder: str) -> None:
    job = rayjob_of(folder)
    preset, _, others = entrypoint_of(job)
    presets = presets_of(render(folder))
    mounts = {m["name"]: m["mountPath"] for m in ray_container(groups(job)["head"])["volumeMounts"]}
    assert presets["data"][preset.name] == preset.read_text()
    assert f"{mounts['presets']}/{preset.name} " in job["spec"]["entrypoint"]
    config = config_of(job)
    assert config.ray.address == "auto", "without an address the run starts a Ray of its own in the head pod"
    assert str(config.output_dir) == mounts["runs"]
    assert job["spec"]["backoffLimit"] > 0 and "--resume" in others
    assert config.pipeline.checkpoint_every_batches > 0, "nothing to resume from"


def test_train_can_resume() -> None:
    if "--resume" not in train_options():
        pytest.skip("`opdlm train` has no --resume yet: the jobs' commands cannot run as they stand")


def test_every_preset_is_in_the_config_map() -> None:
    (kustomization,) = load(PRESETS / "Kustomization")
    (generator,) = kustomization["configMapGenerator"]
    assert sorted(generator["files"]) == sorted(p.name for p in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("folder", RUNS)
def test_images_and_versions(folder: str) -> None:
    import ray

    job = rayjob_of(folder)
    images = {c["image"] for pod in pods(job).values() for c in pod["spec"]["containers"]}
    gpus = any("nvidia.com/gpu" in ray_container(g)["resources"]["limits"] for g in groups(job).values())
    assert images == {f"opdlm:{PROJECT['version']}-{'cuda' if gpus else 'cpu'}"}
    assert cluster(job)["rayVersion"] == ray.__version__


def fits(processes: list[Process], cpus: float, gpus: float, count: int) -> bool:
    """Whether the processes of a role fit into `count` pods, placed one after another."""
    free = [[cpus, gpus] for _ in range(count)]
    for process in processes:
        pod = next((p for p in free if p[0] >= process.cpus and p[1] >= process.gpus), None)
        if pod is None:
            return False
        pod[0] -= process.cpus
        pod[1] -= process.gpus
    return True


@pytest.mark.parametrize("folder", RUNS)
@pytest.mark.parametrize("role", ROLES)
def test_placement_fits_the_group(folder: str, role: str) -> None:
    job = rayjob_of(folder)
    placement = plan(config_of(job))
    group, processes = groups(job)[role], [p for p in placement.processes if p.role == role]
    limits = {k: quantity(v) for k, v in ray_container(group)["resources"]["limits"].items()}
    gpus = limits.get("nvidia.com/gpu", 0)
    assert fits(processes, limits["cpu"], gpus, group["replicas"])
    assert group["replicas"] <= group["maxReplicas"]
    assert gpus * group["replicas"] == sum(p.gpus for p in processes), "GPUs that the config does not use"

    wanted = getattr(config_of(job), role).resources.labels.items()
    having = [name for name, other in groups(job).items() if wanted <= other.get("labels", {}).items()]
    assert having == [role], "the role's processes must find their group, and no other"

    shm = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")["emptyDir"]
    store = float(group["rayStartParams"]["object-store-memory"])
    assert shm["medium"] == "Memory" and store <= quantity(shm["sizeLimit"])
    if role != "teacher":
        assert store >= 2 * placement.payload["weights"], "the old and the new weights"
    per_pod = -(-len(processes) // group["replicas"])
    model = 2 * placement.shape.parameters  # a GPU process reads its bfloat16 weights through host memory
    on_host = [p.memory["runtime"] + model if gpus else p.total_bytes for p in processes]
    assert sum(on_host[:per_pod]) + quantity(shm["sizeLimit"]) <= limits["memory"]
    if gpus:
        product = group["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]
        assert all(p.total_bytes / p.gpus < GPU_BYTES[product] for p in processes)
        assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


@pytest.mark.parametrize("folder", RUNS)
def test_head_runs_the_driver_and_no_actors(folder: str) -> None:
    job = rayjob_of(folder)
    head = groups(job)["head"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "entrypointNumCpus" not in job["spec"], "it would keep the driver from a head without CPUs"
    shm = next(v for v in head["template"]["spec"]["volumes"] if v["name"] == "shm")["emptyDir"]
    assert float(head["rayStartParams"]["object-store-memory"]) <= quantity(shm["sizeLimit"])


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-8b"])
def test_one_node_holds_the_run(name: str) -> None:
    workers = cluster(rayjob_of(f"overlays/h200-8x1/{name}"))["workerGroupSpecs"]
    limits = [ray_container(group)["resources"]["limits"] for group in workers]
    assert sum(g["replicas"] * int(of["nvidia.com/gpu"]) for g, of in zip(workers, limits, strict=True)) == 8
    learner = workers[2]["template"]["metadata"]["labels"]
    for group in workers[:2]:
        affinity = group["template"]["spec"]["affinity"]["podAffinity"]
        (near,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert near["topologyKey"] == "kubernetes.io/hostname"
        assert near["labelSelector"]["matchLabels"].items() <= learner.items()


def test_rollout_and_teacher_groups_scale() -> None:
    job = rayjob_of("overlays/multi-node")
    assert cluster(job)["enableInTreeAutoscaling"] and cluster(job)["autoscalerOptions"]["version"] == "v2"
    for group in (groups(job)[name] for name in ("rollout", "teacher")):
        assert group["minReplicas"] < group["replicas"] < group["maxReplicas"]
    assert groups(job)["learner"]["maxReplicas"] == 1


def with_kueue(tmp_path: Path, folder: str) -> list[str]:
    inside = {"resources": [folder], "components": ["components/kueue"]}
    content = {k: [os.path.relpath(KUBERAY / p, tmp_path) for p in v] for k, v in inside.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    job = rayjob_of(tmp_path)
    assert job["metadata"]["labels"][KUEUE_LABEL] == "opdlm" and job["spec"]["suspend"] is True
    assert schema_errors(job) == []
    return broken_rules(job)


def test_kueue_is_an_option(tmp_path: Path) -> None:
    assert with_kueue(tmp_path, "overlays/h200-8x1/qwen3-8b") == []


def test_kueue_does_not_go_with_autoscaling(tmp_path: Path) -> None:
    assert with_kueue(tmp_path, "overlays/multi-node") == ["Kueue does not admit autoscaled groups"]


def test_own_recipe_reaches_the_pods(tmp_path: Path) -> None:
    (tmp_path / "qwen3-4b.yaml").write_text("name: mine\n")
    overlay = {
        "namespace": "opdlm",
        "resources": [os.path.relpath(KUBERAY / "overlays/h200-8x1/qwen3-4b", tmp_path)],
        "images": [{"name": "opdlm", "newName": "registry.example/team/opdlm"}],
        "configMapGenerator": [{"name": "opdlm-presets", "behavior": "merge", "files": ["qwen3-4b.yaml"]}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    presets, shipped = presets_of(render(tmp_path)), presets_of(render("overlays/h200-8x1/qwen3-4b"))
    assert presets["data"] == shipped["data"] | {"qwen3-4b.yaml": "name: mine\n"}
    assert presets["metadata"]["name"] != shipped["metadata"]["name"]
    for group in groups(rayjob_of(tmp_path)).values():
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        assert volumes["presets"]["configMap"]["name"] == presets["metadata"]["name"]
        assert ray_container(group)["image"] == f"registry.example/team/opdlm:{PROJECT['version']}-cuda"


def test_shell_is_restricted_and_has_the_volumes() -> None:
    (shell,) = load(KUBERAY / "shell.yaml")
    head = groups(base_job())["head"]["template"]["spec"]
    (container,) = shell["spec"]["containers"]
    volumes = {v["name"]: v for v in head["volumes"]}
    assert shell["spec"]["securityContext"] == head["securityContext"]
    assert container["securityContext"] == head["containers"][0]["securityContext"]
    assert all(volumes[v["name"]] == v for v in shell["spec"]["volumes"])
    assert container["image"] == f"opdlm:{PROJECT['version']}-cpu"


def test_network_policy_and_monitor_select_the_pods() -> None:
    (policy,) = load(KUBERAY / "namespace" / "networkpolicy.yaml")
    (monitor,) = load(KUBERAY / "monitoring" / "podmonitor.yaml")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    scraped = monitor["spec"]["selector"]["matchLabels"].items() - {("ray.io/is-ray-node", "yes")}
    opened = {p["port"] for rule in policy["spec"]["ingress"] for p in rule.get("ports", [])}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    job = base_job()
    for pod in pods(job).values():
        assert selected <= pod["metadata"]["labels"].items()
    for group in groups(job).values():
        ports = {p["name"]: p["containerPort"] for p in ray_container(group)["ports"]}
        assert scraped <= group["template"]["metadata"]["labels"].items()
        assert ports[endpoint["port"]] in opened
    assert 8265 in opened


def test_alert_rules_use_metrics_that_ray_has() -> None:
    import ray

    (rule,) = load(KUBERAY / "monitoring" / "rules.yaml")
    expressions = [r["expr"] for g in rule["spec"]["groups"] for r in g["rules"]]
    metrics = {name for e in expressions for name in re.findall(r"\bray_[a-z_]+(?=[{ ])", e)}
    source = "".join(p.read_text() for p in Path(ray.__file__).parent.glob("dashboard/modules/**/*.py"))
    assert metrics and all(m.removeprefix("ray_") in source for m in metrics)


@pytest.mark.parametrize("folder", RUNS[1:])
def test_monitoring_comes_with_the_gpu_runs(folder: str) -> None:
    objects = render(folder)
    assert {o["metadata"]["name"] for o in of_kind(objects, "PrometheusRule")} == {"opdlm-ray", "opdlm-run"}
    (grafana,) = [o for o in of_kind(objects, "ConfigMap") if "grafana_dashboard" in o["metadata"].get("labels", {})]
    assert grafana["metadata"]["name"] == "opdlm-grafana-run"
    assert list(grafana["data"]) == ["opdlm-run.json"]
    assert len(grafana["data"]["opdlm-run.json"]) < 10**6, "an object of Kubernetes holds a megabyte"


def test_documentation_names_what_exists() -> None:
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    for path in re.findall(r"deploy/[\w./-]+", text):
        assert (REPOSITORY / path).exists(), path
    applies = re.findall(r"kubectl apply.*", text)
    assert applies and all("--server-side" in line for line in applies)
    jobs = [rayjob_of(folder) for folder in RUNS]
    for name in re.findall(r"logs -f job/([\w-]+)", text):
        assert name in {job["metadata"]["name"] for job in jobs}
    demo = [c["resources"]["requests"] for pod in pods(jobs[0]).values() for c in pod["spec"]["containers"]]
    cpus, memory = (sum(quantity(requests[what]) for requests in demo) for what in ("cpu", "memory"))
    assert f"asks for {cpus:.1f} CPUs and {memory / 2**30:.1f} GiB" in text
    rules = "".join(file.read_text() for file in (KUBERAY / "monitoring").glob("*rules.yaml"))
    assert all(f"alert: {name}" in rules for name in re.findall(r"\bOpdlm\w+", text))
