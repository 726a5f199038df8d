"""Alignment of all layers, in float64 with gradients: a loop over positions and layers, against the learner."""

import numpy as np
import pytest
import torch

from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.unmasking import DynamicUnmasking
from common.seeds import state_rng
from common.states import select_states
from common.student import load_model, load_tokenizer
from common.trajectory import TrajectoryMeta
from deploy.commands.dry_run import _alignment_cost
from deploy.model_checks import check_models
from deploy.placement import plan
from learner.alignment import LayerAlignment, frozen_base
from learner.batches import BatchBuilder
from learner.objective import empty_sums
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3
from tests.unit.test_parity import BLOCK, CPU, trajectories

LAMBDA = 10.0
LAYERS = ["--objective.terms.alignment_of", "layers"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_qwen3(folder / "student", seed=0), tiny_qwen3(folder / "arlm", seed=1)


@pytest.fixture(scope="module")
def rolled_out(folders):
    """Trajectories with random states, and a tokenizer."""
    tokenizer = load_tokenizer(folders[0])
    return trajectories(load_model(folders[0], torch.float32, "sdpa"), tokenizer, DynamicUnmasking(threshold=0.05))


def settings(folders, *overrides: str):
    return load_config(
        "tiny",
        [
            "--model.path", folders[0], "--teacher.path", folders[1], "--teacher.backend", "transformers",
            "--objective.target.kind", "hard", "--objective.terms.alignment", str(LAMBDA), *overrides,
        ],
    )  # fmt: skip


def direct(student, base, rows, mask_token_id: int, weights: dict[int, float]) -> torch.Tensor:
    """Cross-entropy + lambda (1 - sum_l v_l cos), mean over a row's masked positions, then over rows."""
    losses = []
    for t in rows:
        prompt, own = len(t.prompt_ids), []
        with torch.no_grad():
            clean = torch.from_numpy(t.causal_ids.astype(np.int64))[None]
            teacher = base.model(input_ids=clean, output_hidden_states=True).hidden_states
        masked = prompt + t.masked_offsets
        for block in np.unique(masked // BLOCK):
            x = torch.from_numpy(t.x0[: (block + 1) * BLOCK].astype(np.int64))
            here = masked[masked // BLOCK == block]
            x[torch.from_numpy(here.astype(np.int64))] = mask_token_id
            of = torch.arange(len(x)) // BLOCK
            mask = (of[:, None] >= of[None])[None, None]
            states = student.model(input_ids=x[None], attention_mask=mask, output_hidden_states=True).hidden_states
            log_p = student.lm_head(states[-1][0]).log_softmax(-1)
            for i in here:
                if t.loss_weight[list(masked).index(i)] == 0:
                    continue
                cosine = sum(
                    v * torch.cosine_similarity(states[layer][0, i], teacher[layer][0, i - 1], dim=0)
                    for layer, v in weights.items()
                )
                own.append(-log_p[i, int(t.x0[i])] + LAMBDA * (1 - cosine))
        losses.append(torch.stack(own).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["--objective.terms.alignment_of", "layers"], {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        (
            [
                *LAYERS, "--objective.terms.alignment_layers", "[1, 2]",
                "--objective.terms.alignment_weights", "[3, 1]",
                "--learner.freeze_embeddings", "true",
            ],
            {1: 0.75, 2: 0.25},
        ),
    ],
    ids=["all", "chosen-and-frozen"],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_formula(folders, rolled_out, overrides, weights):
    config = settings(folders, *overrides, "--objective.state.kind", "random")
    tokenizer = load_tokenizer(folders[0])
    for t in rolled_out:
        select_states(t, config.objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    rows = [t for t in rolled_out if (t.loss_weight > 0).any()]
    student, base = (load_model(folder, torch.float64, "sdpa") for folder in folders)
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test")
    build = BatchBuilder.of(config, meta, attention="sdpa", device=CPU)
    module = TrainingModule(student, config)
    module.alignment = LayerAlignment(student, base, config.objective.terms)
    total, sums = 0.0, empty_sums(CPU)
    for rank in range(2):
        for micro in build.update(rows, rank, 2)[0]:
            loss = module(build.tensors(micro, rows), sums)
            loss.backward()
            total += loss.item()
    packed = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = load_model(folders[0], torch.float64, "sdpa")
    wanted = direct(plain, base, rows, tokenizer.mask_token_id, weights)
    wanted.backward()
    assert total == pytest.approx(wanted.item(), rel=1e-6)  # coefficients are float32
    assert sums.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert ("model.embed_tokens.weight" in packed) == (not config.learner.freeze_embeddings)
    for name, p in plain.named_parameters():
        if name in packed:
            torch.testing.assert_close(packed[name], p.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_base_is_loaded_where_layers_are_aligned(folders):
    assert frozen_base(settings(folders, "--objective.terms.alignment_of", "layers"), CPU) is not None
    hidden = ["--objective.target.kind", "teacher"]
    assert frozen_base(settings(folders, *hidden), CPU) is None


def test_dry_run_says_what_it_costs(folders):
    config = settings(folders, "--objective.terms.alignment_of", "layers")
    placement = plan(config)
    learner = next(p for p in placement.processes if p.role == "learner")
    assert learner.memory["frozen ARLM"] == 4 * placement.teacher_shapes[0].parameters
    assert _alignment_cost(config, placement).startswith("alignment of 3 layers: a frozen ARLM of ")
    assert "frozen ARLM" in plan(load_config("tiny")).processes[-1].memory
    assert plan(load_config("tiny")).processes[-1].memory["frozen ARLM"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "terms.alignment compares with a teacher, and target.kind"),
        ([*LAYERS, "--objective.terms.alignment_layers", "[1, 1]"], r"alignment_layers \(1, 1\) names a layer twice"),
        (["--objective.terms.alignment_layers", "[1]"], r"alignment_layers \(1,\) is for alignment_of 'layers'"),
        ([*LAYERS, "--objective.terms.alignment_weights", "[1]"], r"has not one weight for each of alignment_layers"),
        (
            ["--objective.terms.alignment_of", "layers", "--learner.gradient_checkpointing", "true"],
            "which learner.gradient_checkpointing does not leave to it",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused(folders, overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings(folders, *overrides)


def test_layers_that_a_model_does_not_have(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"alignment_layers: 7 is none of the layers, which are 0 .* to 2"):
        check_models(settings(folders, *LAYERS, "--objective.terms.alignment_layers", "[0, 7]"))
    deeper = tiny_qwen3(tmp_path / "deeper", layers=3)
    with pytest.raises(ConfigError, match=r"alignment_of: the student has 2 layers and teacher.path .* 3"):
        check_models(settings((folders[0], deeper), "--objective.terms.alignment_of", "layers"))
