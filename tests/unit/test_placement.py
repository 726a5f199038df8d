"""Placement: one process per reservation, totals, estimates, and refusal with the fields to lower."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import cluster
from deploy.placement import check_memory, check_resources, model_shape, object_store_mib, plan
from learner.deepspeed_config import WHOLE_ELEMENTS


def test_every_process_is_listed_with_its_resources():
    placement = plan(load_config("tiny", ["--rollout.actors", "3", "--learner.resources.threads", "2"]))
    assert [(p.role, p.index) for p in placement.processes] == [
        ("rollout", 0), ("rollout", 1), ("rollout", 2), ("teacher", 0), ("learner", 0), ("learner", 1),
    ]  # fmt: skip
    assert placement.cpus == 3 * 0.25 + 0.25 + 2 * 0.5
    assert placement.gpus == 0
    assert {p.threads for p in placement.processes if p.role == "learner"} == {2}


def test_sizes_come_from_the_models_folder():
    config = load_config("tiny")
    shape = model_shape("model.path", config.model.path, None)
    with safe_open(Path(config.model.path) / "model.safetensors", "pt") as file:
        stored = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    norms = sum(size[0] for size in stored if len(size) == 1)
    assert shape.parameters + norms == sum(size[0] * (size[1] if len(size) > 1 else 1) for size in stored)


def test_estimates_follow_the_config():
    one, two = (plan(load_config("qwen3-8b", ["--learner.ranks", n])) for n in ("1", "2"))
    states = "optimiser states (sharded)"
    assert one.processes[-1].memory[states] == 2 * two.processes[-1].memory[states]
    assert [p.processes[-1].memory["weights kept whole"] for p in (one, two)] == [0, WHOLE_ELEMENTS * 2 // 2]
    half = plan(load_config("qwen3-8b", ["--rollout.slots", "24"]))
    assert one.processes[0].memory["KV cache"] == 2 * half.processes[0].memory["KV cache"]
    fewer = plan(load_config("qwen3-8b", ["--rollout.max_batched_tokens", "4096"]))
    assert one.processes[0].memory["prefill"] == 4 * fewer.processes[0].memory["prefill"]
    # vLLM's prompt log-probabilities, outside its own profile: [tokens of a step, V] in the model's dtype and float32
    assert one.processes[2].memory["logits"] == 8192 * 151936 * (2 + 4)
    fewer = plan(load_config("qwen3-8b", ["--teacher.max_batched_tokens", "1024"]))
    assert fewer.processes[2].memory["logits"] == one.processes[2].memory["logits"] // 8
    assert one.payload["weights"] == 2 * one.shape.parameters
    assert one.payload["targets (topk)"] == 128 * 4000 * (16 * 8 + 4)
    assert one.payload["targets (hidden)"] == 128 * 4000 * 4096 * 2


def test_staged_weights_are_counted_where_they_are():
    def staged(*overrides: str) -> list[int]:
        placement = plan(load_config("qwen3-4b", ["--publish.transport", *overrides]))
        weights = placement.payload["weights"]
        return [p.memory["staged weights"] // weights for p in placement.processes if p.role != "teacher"]

    assert staged("object_store") == [1, 1, 0, 0, 0, 0]
    assert staged("auto") == [1, 1, 1, 0, 0, 0]
    on_cpu = ["--rollout.resources.gpus", "0", "--learner.resources.gpus", "0", "--learner.liger_kernels", "false"]
    assert staged("auto", *on_cpu) == [0] * 6


def test_a_larger_teacher_counts_with_its_own_size(tmp_path):
    raw = json.loads((Path(load_config("tiny").model.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"hidden_size": 512}))
    small, large = (plan(load_config("tiny", ["--teacher.path", p])) for p in ("null", str(tmp_path)))
    teacher = {p: next(q for q in plan_.processes if q.role == "teacher") for p, plan_ in (("s", small), ("l", large))}
    assert teacher["l"].memory["weights"] > 3 * teacher["s"].memory["weights"]
    assert large.payload["targets (hidden)"] == 4 * small.payload["targets (hidden)"]
    assert large.processes[0] == small.processes[0]


def test_unknown_sizes_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: 'some/model' is not a model folder.*model\.shape"):
        plan(load_config("tiny", ["--model.path", "some/model"]))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match=r"lacks num_hidden_layers, num_attention_heads, intermediate_size"):
        plan(load_config("tiny", ["--model.path", str(tmp_path)]))


def test_too_few_cpus_or_gpus_are_refused_by_role_and_field():
    placement = plan(load_config("qwen3-8b"))
    check_resources(placement, cpus=16, gpus=8)
    with pytest.raises(ConfigError) as error:
        check_resources(placement, cpus=16, gpus=4)
    for part in ("asks for 8 GPUs", "rollout 2 x 1", "learner 4 x 1", "Ray has 4", "learner.ranks", "resources.gpus"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"asks for 16 CPUs .*Ray has 2; lower rollout\.actors.*resources\.cpus"):
        check_resources(placement, cpus=2, gpus=8)


def test_fractions_that_just_fit_are_accepted():
    resources = ["--rollout.actors", "7", "--rollout.resources.cpus", "0.1", "--teacher.resources.cpus", "0.3"]
    check_resources(plan(load_config("tiny", resources)), cpus=2, gpus=0)


def test_the_object_store_holds_two_versions_of_the_weights_and_the_batches_under_way():
    def store(*overrides: str) -> int:
        config = load_config("qwen3-4b", ["--publish.transport", "object_store", *overrides])
        return object_store_mib(config, plan(config))

    payload = plan(load_config("qwen3-4b")).payload
    weights, batch = payload["weights"], payload["trajectories"] + payload["targets (hidden)"]
    assert 2 * weights < store("--teacher.target", "hidden", "--pipeline.staleness", "0") * 2**20
    more = store("--teacher.target", "hidden", "--pipeline.staleness", "1")
    assert more * 2**20 == pytest.approx(2 * weights + 2 * batch, rel=1e-3)
    assert store("--publish.transport", "broadcast") < weights / 2**20
    assert store("--ray.object_store_mib", "40000") == 40000
    with pytest.raises(ConfigError, match=r"ray\.object_store_mib: 512 .* give at least \d{5}, or leave it out"):
        store("--ray.object_store_mib", "512")
    assert object_store_mib(load_config("tiny"), plan(load_config("tiny"))) == 512


@pytest.mark.parametrize(("asked", "given"), [([], 700), (["--ray.object_store_mib", "900"], 900)])
def test_ray_started_here_has_the_store_that_is_asked_for_or_needed(monkeypatch, asked, given):
    started: dict[str, object] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: started.update(options))
    cluster.connect(load_config("tiny", asked).ray, 700)
    assert started["object_store_memory"] == given * 2**20


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--rollout.prompts_per_batch", "1000000"], "rollout.prompts_per_batch: 1000000 prompts with 1 trajectories"),
        (["--rollout.slots", "65536", "--curriculum.max_tokens", "100000"], "rollout-0 needs about "),
        (
            ["--learner.max_tokens_per_microbatch", "100000000"],
            "most of it for activations; this machine has 8.0: lower",
        ),
        (["--teacher.kv_cache_mib", "16000"], "teacher-0 needs about 16.3 GiB, most of it for KV cache"),
    ],
)
def test_what_cannot_fit_into_this_machine_is_refused(overrides, said):
    config = load_config("tiny", overrides)
    with pytest.raises(ConfigError) as error:
        check_memory(config, plan(config), 8 * 2**30)
    assert said in str(error.value)
    check_memory(load_config("tiny"), plan(load_config("tiny")), 2**30)
