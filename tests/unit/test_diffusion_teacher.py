"""A teacher that reads masked states: its targets are those of a direct forward of that student at the same states."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.rollout import RolloutActor
from actors.teacher.actor import annotate, build_backend
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert_folder
from common.prompts import Prompt
from common.student import load_model
from common.trajectory import from_batch
from deploy.model_checks import check_models
from tests.models import tiny_qwen3


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """An ARLM, and the folder of a student of block size 2."""
    folder = tmp_path_factory.mktemp("models")
    other = tiny_qwen3(folder / "other", seed=3)
    convert_folder(other, folder / "student", 2, "auto", torch.float32)
    return tiny_qwen3(folder / "arlm", seed=0), str(folder / "student")


def settings(folders, *overrides: str):
    return load_config(
        "tiny",
        [
            "--model.path", folders[0], "--teacher.path", folders[1], "--teacher.backend", "transformers",
            "--teacher.reads", "state", "--teacher.max_batched_tokens", "64", "--evaluation.problems", "null",
            "--block_size", "8", *overrides,
        ],
    )  # fmt: skip


def trajectories(config):
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, "q", rng.integers(10, 200, 5 + 2 * i).astype(np.int32)) for i in range(5)]
    actor = RolloutActor(config, 0)
    streamed = list(actor.rollout(prompts, 16, config.block_size, DynamicUnmasking(threshold=0.2)))[::2]
    return [t for batch in streamed for t in from_batch(batch)[0]]


def direct(model, trajectory, block_size: int, mask_token_id: int) -> dict[int, torch.Tensor]:
    """Final hidden states by offset: one plain forward for each state and block, which ends with that block."""
    prompt, found = len(trajectory.prompt_ids), {}
    for state in range(trajectory.state_count):
        masked = prompt + trajectory.masked_offsets[trajectory.masked_state == state]
        shown = trajectory.shown_at(trajectory.masked_state == state, mask_token_id)
        for block in np.unique(masked // block_size):
            x = trajectory.x0[: (block + 1) * block_size].astype(np.int64)
            here = masked[masked // block_size == block]
            x[here] = np.broadcast_to(shown, masked.shape)[masked // block_size == block]
            of = torch.arange(len(x)) // block_size
            with torch.no_grad():
                hidden = model.model(
                    input_ids=torch.from_numpy(x)[None],
                    attention_mask=(of[:, None] >= of[None])[None, None],
                    use_cache=False,
                ).last_hidden_state[0]
            found |= {int(i) - prompt: hidden[i] for i in here}
    return found


MIXED = '{"kind": "random", "uniform_share": 0.5, "all_positions": true}'


@pytest.mark.parametrize("state", ["per_block", "global", "random", "complementary", MIXED])
@pytest.mark.parametrize("target", ["hidden", "topk"])
def test_targets_are_those_of_a_direct_forward_at_the_same_states(folders, state, target):
    field = "--objective.state" if state == MIXED else "--objective.state.kind"
    config = settings(folders, field, state, "--teacher.target", target)
    rows = trajectories(config)
    backend = build_backend(config.teacher, config.teacher_path)
    annotate(backend, rows)
    model = load_model(folders[1], torch.float32, "sdpa")
    compared = 0
    for t in rows:
        wanted = direct(model, t, 2, model.config.mask_token_id)
        for row, offset in enumerate(t.target_offsets):
            hidden = wanted[int(offset)]
            if target == "hidden":
                np.testing.assert_allclose(t.hidden.reshape(-1, 64)[row], hidden.numpy(), rtol=1e-4, atol=1e-4)
            else:
                log_p = (model.lm_head.weight @ hidden).log_softmax(-1).detach().numpy()
                ids = t.topk_ids.reshape(-1, 16)[row]
                np.testing.assert_allclose(t.topk_logprobs.reshape(-1, 16)[row], log_p[ids], rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(sorted(log_p)[-16:], sorted(log_p[ids]), rtol=1e-4)
            compared += 1
    assert compared > 20


def test_a_state_with_more_masks_gives_other_targets(folders):
    """The teacher sees the state, and not the clean tokens at masked positions."""
    config = settings(folders)
    (t, *_) = trajectories(config)
    backend = build_backend(config.teacher, config.teacher_path)
    annotate(backend, [t])
    before = t.hidden.copy()
    t.response_ids = t.response_ids.copy()
    last = int(t.target_offsets[-1])
    t.response_ids[last] = (t.response_ids[last] + 7) % 200  # masked in its block, and no block is behind it
    annotate(backend, [t])
    np.testing.assert_array_equal(t.hidden, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--teacher.backend", "vllm"], r"teacher: reads 'state' needs block-causal attention"),
        (["--objective.state.kind", "all_rounds"], r"objective.state.kind 'all_rounds' trains a position in several"),
        (
            ["--objective.state", '{"kind": "complementary", "masks": {"all_positions": true}}'],
            r"objective.state.kind 'complementary' trains a position in several",
        ),
        (["--evaluation.held_out_prompts", "4"], r"evaluation.held_out_prompts \(4\) has the teacher write"),
        (["--evaluation.problems", "deploy/data/word_problems_heldout.jsonl"], r"evaluation.teacher \(True\)"),
    ],
)
def test_what_a_diffusion_teacher_cannot_do_is_refused(folders, overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings(folders, *overrides)


def test_the_folder_is_a_students_with_the_same_mask_token(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher.path: .* is an autoregressive model, not a student"):
        check_models(settings((folders[0], folders[0])))
    other = Path(tmp_path, "other")
    convert_folder(folders[0], other, 4, "<|pad|>", torch.float32)
    with pytest.raises(ConfigError, match=r"teacher.path: the mask token of .* both read the same states"):
        check_models(settings((folders[0], str(other))))
    assert check_models(settings(folders)).positions == 512
