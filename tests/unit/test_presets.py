"""The presets are the recipes of method.md section 7, and plan on a machine without their models and prompts."""

import io

import pytest
from rich.console import Console

from common.config.file import load_config, preset_names
from deploy.commands.dry_run import show
from deploy.placement import plan

GENERAL = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"]
MATH = ["qwen3-4b-math", "qwen3-4b-math-thinking"]
NAMED = ["paper", "released"]
REAL = "smollm2-135m"
DRAFTER = "drafter-smollm2"


def test_these_presets_are_shipped():
    assert preset_names() == sorted(["tiny", REAL, DRAFTER, *GENERAL, *MATH, *NAMED])


@pytest.mark.parametrize("name", ["tiny", *GENERAL, *MATH, *NAMED])
def test_dry_run_shows_config_placement_and_estimates(name):
    console = Console(record=True, width=120, file=io.StringIO())
    show(load_config(name), console)
    text = console.export_text()
    for part in (f"name: {name}", "rollout-0", "teacher-0", "learner-1", "targets (hidden)", "together:"):
        assert part in text
    assert ("note: data.prompts" in text) == (name != "tiny")


@pytest.mark.parametrize("name", [*GENERAL, *MATH])
def test_recipe(name):
    config = load_config(name)
    learner, rollout = config.learner, config.rollout
    assert rollout.prompts_per_batch == 128
    assert rollout.prompts_per_batch // learner.batch_rows == 16
    assert (learner.lr, learner.min_lr, learner.warmup_batches, learner.lr_schedule) == (1e-5, 1e-6, 5, "cosine")
    assert (learner.betas, learner.weight_decay, learner.grad_clip) == ((0.9, 0.999), 0, 1)
    assert (config.block_size, rollout.temperature) == (4, 1)
    assert (rollout.unmasking.rule, rollout.unmasking.threshold) == ("dynamic", 0.9)
    assert (config.objective.state.kind, config.objective.divergence.kind) == ("per_block", "forward_kl")
    assert config.data.max_prompt_tokens == 2000
    assert config.pipeline.staleness == 0


@pytest.mark.parametrize("name", GENERAL)
def test_general_recipe(name):
    config = load_config(name)
    curriculum = config.curriculum
    assert (curriculum.schedule, curriculum.min_tokens, curriculum.max_tokens, curriculum.batches) == (
        "cos",
        100,
        4000,
        100,
    )
    assert config.data.domain_max_tokens == {"math": 4096, "code": 2048, "chat": 2048, "science": 1024}
    assert (config.data.epochs, config.data.enable_thinking) == (1, False)
    large = name in ("qwen3-4b", "qwen3-8b")
    assert (config.teacher.target, config.teacher.top_k) == ("topk" if large else "hidden", 16)


@pytest.mark.parametrize(
    ("name", "thinking", "longest", "batches"), [(MATH[0], False, 2000, 10), (MATH[1], True, 8000, 20)]
)
def test_math_recipe(name, thinking, longest, batches):
    config = load_config(name)
    curriculum = config.curriculum
    assert (curriculum.schedule, curriculum.min_tokens) == ("linear", 100)
    assert (curriculum.max_tokens, curriculum.batches) == (longest, batches)
    assert (config.data.enable_thinking, config.data.epochs, config.teacher.target) == (thinking, 10, "hidden")


@pytest.mark.parametrize("name", [*GENERAL, *MATH, *NAMED])
def test_placement_fits_one_node_of_eight_gpus(name):
    placement = plan(load_config(name))
    assert placement.gpus == 8
    assert all(p.total_bytes < 75 * 2**30 for p in placement.processes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), (MATH[0], 4.02)],
)
def test_sizes_are_those_of_qwen3(name, parameters):
    assert plan(load_config(name)).shape.parameters / 1e9 == pytest.approx(parameters, rel=0.005)


def test_tiny_adds_up_to_a_machine_with_two_cpus():
    placement = plan(load_config("tiny"))
    assert placement.cpus <= 2
    assert {p.threads for p in placement.processes} == {1}


def test_the_preset_for_a_real_model_shares_one_gpu_between_its_roles():
    config = load_config(REAL)
    placement = plan(config)
    assert placement.gpus == pytest.approx(1)
    assert [(p.role, p.index) for p in placement.processes] == [("rollout", 0), ("teacher", 0), ("learner", 0)]
    assert sum(p.total_bytes for p in placement.processes) < 60 * 2**30
    assert placement.shape.parameters / 1e6 == pytest.approx(134.5, rel=0.005)
    assert (config.model.path, config.data.prompts) == ("runs/real/model", "runs/real/prompts.parquet")


def test_the_drafters_preset_trains_gated_adapters_alone():
    config = load_config(DRAFTER)
    assert (config.objective.method, config.attention.context, config.adapter.gated) == ("drafter", "causal", True)
    placement = plan(config)
    per_layer = 576 * 2 * (576 + 192) + 3 * 576 * 1536, (4 * 576 + 2 * (576 + 192)) + 3 * (576 + 1536)
    assert placement.shape.targeted_parameters(config.adapter.targets) == 30 * per_layer[0]
    trained = 30 * 64 * per_layer[1]
    assert placement.payload["weights"] == placement.checkpoint["model"] == 2 * trained
    learner = next(p.memory for p in placement.processes if p.role == "learner")
    assert learner["frozen base of the adapters"] == 2 * placement.shape.parameters
    assert learner["optimiser states (sharded)"] == 12 * trained
    assert sum(p.total_bytes for p in placement.processes) < 30 * 2**30
    console = Console(record=True, width=120, file=io.StringIO())
    show(config, console)
    assert f"of the adapters  {trained:,}" in console.export_text()


def test_paper_is_algorithm_1_and_released_is_the_launchers():
    paper, released = load_config("paper"), load_config("released")
    assert (paper.objective.state.kind, paper.objective.normalization, paper.teacher.target) == (
        "global",
        "row_sum",
        "hidden",
    )
    assert (paper.curriculum.schedule, paper.curriculum.batches, paper.objective.exclude_eos) == ("linear", 10, False)
    assert (released.objective.state.kind, released.objective.normalization) == ("per_block", "row_mean")
    assert (released.teacher.target, released.teacher.top_k, released.objective.topk_tail) == ("topk", 16, "drop")
    assert (released.curriculum.schedule, released.curriculum.batches, released.objective.exclude_eos) == (
        "cos",
        100,
        True,
    )
