"""Offline responses: read, chosen, turned into trajectories, and trained like rollouts."""

import json
import math

import numpy as np
import pytest
import torch
from pyarrow import parquet
from pydantic import ValidationError

from actors.responder import ResponseRequest, SamplerEngine, Sampling
from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.objective import ObjectiveConfig
from common.config.sources import MixtureSource, OfflineSource, StudentSource
from common.prompts import Prompt, PromptError
from common.responses import load_responses, offline_share, offline_trajectory, with_responses
from common.seeds import state_rng
from common.states import select_states
from common.student import hidden_states, load_model, load_tokenizer
from common.trajectory import TrajectoryMeta, batch_info, finish_reason, from_batch, to_batch, until_end
from common.vocabulary import tokenizer_fingerprint
from deploy import preflight, responders
from deploy import respond as respond_module
from learner.objective import ChunkedDivergence, empty_sums
from tests.models import tiny_qwen3
from tests.unit.test_config import run_config
from tests.unit.test_parity import BLOCK, CPU, builder, direct_loss, set_targets


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    path = tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0)
    return load_model(path, torch.float32, "sdpa"), load_tokenizer(path)


def prompt(length: int, response: list[int], ordinal: int = 0) -> Prompt:
    ids = np.arange(5, 5 + length, dtype=np.int32)
    return Prompt(ordinal, "q", ids, responses=(np.asarray(response, np.int32),))


def offline(tokenizer, count: int = 8) -> list:
    """Responses on and off the block grid, ended and cut off."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        body = rng.integers(5, 200, 3 + 2 * i).tolist()
        p = prompt([1, 3, 4, 5, 8, 9, 10, 16][i], [*body, tokenizer.eos_token_id], i)
        made.append(offline_trajectory(p, 0, 14, BLOCK, tokenizer.mask_token_id, tokenizer.eos_token_id))
    return made


def test_a_response_becomes_a_trajectory():
    t = offline_trajectory(prompt(5, [10, 11, 12, 13, 1]), 0, 100, 4, mask_token_id=99, eos_token_id=1)
    assert t.response_ids.tolist() == [10, 11, 12, 13, 1]
    assert t.tail_ids.tolist() == [99, 99]
    assert (t.finish_reason, t.weights_version, t.is_offline) == ("eos", -1, True)
    assert (t.reveal_round == -1).all()
    cut = offline_trajectory(prompt(5, [10, 11, 12, 13, 1]), 0, 3, 4, mask_token_id=99, eos_token_id=1)
    assert cut.response_ids.tolist() == [10, 11, 12]
    assert (len(cut.tail_ids), cut.finish_reason) == (0, "length")


@pytest.mark.parametrize(
    ("response", "limit", "kept", "reason"),
    [
        ([10, 11, 1], 8, 3, "eos"),
        ([10, 11, 12], 8, 3, "length"),  # whoever made it cut it off; nothing is cut here
        ([10, 11, 12, 13, 14, 1], 3, 3, "length"),  # the end token is behind the cut
        ([10, 11, 1, 12, 13], 3, 3, "eos"),  # the cut leaves the end token last
        ([1], 8, 1, "eos"),
    ],
)
def test_an_offline_response_is_labelled_by_its_last_token(response, limit, kept, reason):
    t = offline_trajectory(prompt(5, response), 0, limit, 4, mask_token_id=99, eos_token_id=1)
    assert (t.response_ids.tolist(), t.finish_reason) == (response[:kept], reason)


@pytest.mark.parametrize(
    ("ids", "kept", "reason"),
    [([5, 6, 1], 3, "eos"), ([5, 6], 2, "length"), ([5, 1, 6, 1], 2, "eos"), ([1, 1], 1, "eos"), ([], 0, "length")],
)
def test_a_response_ends_at_its_first_end_token(ids, kept, reason):
    response = until_end(np.array(ids, np.int32), 1)
    assert (response.tolist(), finish_reason(response, 1)) == (ids[:kept], reason)


def test_the_arrow_batch_knows_which_responses_are_offline(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    batch = to_batch(offline(tokenizer), TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test"))
    assert all(t.is_offline for t in from_batch(batch)[0])
    info = batch_info(batch)
    assert (info.oldest_version, info.offline_rows, info.rollout_tokens, info.teacher_tokens) == (None, 8, 0, 0)


def test_offline_share():
    assert offline_share(StudentSource(), 3) == 0
    assert offline_share(OfflineSource(), 3) == 1
    for schedule, halfway in (("constant", 0.8), ("linear", 0.5), ("cosine", 0.5)):
        source = MixtureSource(schedule=schedule, start=0.8, end=0.2, batches=10)
        assert offline_share(source, 0) == pytest.approx(0.8)
        assert offline_share(source, 5) == pytest.approx(halfway)
        assert offline_share(source, 99) == pytest.approx(0.8 if schedule == "constant" else 0.2)
    cosine = MixtureSource(schedule="cosine", start=1, end=0, batches=8)
    assert offline_share(cosine, 2) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_who_takes_an_offline_response_is_seeded_by_the_ordinal():
    prompts = [Prompt(i, "q", np.arange(3, dtype=np.int32)) for i in range(2000)]
    known = {"q": [np.array([1]), np.array([2]), np.array([3])]}
    chosen = with_responses(prompts, 0.3, known, 2, seed=7)
    took = {p.ordinal for p in chosen if p.responses}
    assert len(took) / 2000 == pytest.approx(0.3, abs=0.03)
    assert took == {p.ordinal for p in with_responses(prompts[::-1], 0.3, known, 2, seed=7) if p.responses}
    assert took < {p.ordinal for p in with_responses(prompts, 0.6, known, 2, seed=7) if p.responses}
    assert took != {p.ordinal for p in with_responses(prompts, 0.3, known, 2, seed=8) if p.responses}
    assert all(p.responses[0] != p.responses[1] for p in chosen if p.responses)
    assert not any(p.responses for p in with_responses(prompts, 0.0, {}, 2, seed=7))


def write(path, *records) -> DataConfig:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return DataConfig(prompts="p", responses=str(path))


def test_text_gets_its_end_token_and_ids_travel_unchanged(tmp_path, model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    eos = tokenizer.eos_token_id
    mine = {"response_ids": [7, 8, eos], "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    data = write(
        tmp_path / "r.jsonl",
        {"question": "q", "response": "ab"},
        {"question": "q", "response": "ab", "finish_reason": "length"},
        {"question": "q", "response": "other", **mine},
        {"question": "q", "response": "ab", **mine, "tokenizer_fingerprint": "another"},
        {"question": "q", "response": "other", **mine, "response_ids": [7, eos, 8, eos]},
        {"question": "q", "response": f"ab{tokenizer.eos_token}ab", "finish_reason": "length"},
        {"question": "not asked"},
    )
    text = tokenizer("ab", add_special_tokens=False)["input_ids"]
    ids = load_responses(data, tokenizer, [prompt(3, [])], [eos])["q"]
    assert [i.tolist() for i in ids] == [[*text, eos], text, [7, 8, eos], [*text, eos], [7, eos], [*text, eos]]
    assert {i.dtype for i in ids} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "other", "response": "a"}, "1 of 1 questions of 'p' have no response, the first is 'q'"),
        ({"question": "q", "answer": "a"}, "no text in field 'response'"),
        ({"question": "q", "response": "", "finish_reason": "length"}, "line 1: the response is empty"),
        ({"question": "q", "response": "a <|mask|>"}, "the response holds the mask token"),
    ],
)
def test_bad_responses(tmp_path, model_and_tokenizer, record, message):
    with pytest.raises(PromptError) as error:
        load_responses(write(tmp_path / "r.jsonl", record), model_and_tokenizer[1], [prompt(3, [])], [1])
    assert message in str(error.value)


def test_no_ids_are_an_empty_response(tmp_path, model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    record = {"question": "q", "response_ids": [], "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    with pytest.raises(PromptError, match="line 1: the response is empty"):
        load_responses(write(tmp_path / "r.jsonl", record), tokenizer, [prompt(3, [])], [1])


def test_written_responses_keep_their_label_when_they_are_read(tmp_path, model_and_tokenizer):
    """One that --max-new-tokens cut off is `length` in the file and in the trajectory."""
    tokenizer = model_and_tokenizer[1]
    eos = tokenizer.eos_token_id
    made = [np.array(ids, np.int32) for ids in ([7, 8, eos], [7, 8, 9], [eos])]
    prompts = [Prompt(i, f"q{i}", np.arange(5, 10, dtype=np.int32)) for i in range(3)]
    table = respond_module._table(
        load_config("tiny"), tokenizer, [eos], tokenizer_fingerprint(tokenizer), prompts, range(1), made
    )
    assert table["finish_reason"].to_pylist() == ["eos", "length", "eos"]
    parquet.write_table(table, tmp_path / "r.parquet")
    data = DataConfig(prompts="p", responses=str(tmp_path / "r.parquet"))
    known = load_responses(data, tokenizer, prompts, [eos])
    read = [
        offline_trajectory(p, 0, 16, BLOCK, tokenizer.mask_token_id, eos)
        for p in with_responses(prompts, 1.0, known, 1, seed=0)
    ]
    assert [t.response_ids.tolist() for t in read] == [ids.tolist() for ids in made]
    assert [t.finish_reason for t in read] == ["eos", "length", "eos"]


def test_preflight_names_the_field(tmp_path):
    overrides = ["--data.limit", "4", "--teacher.backend", "transformers", "--objective.method", "sft"]
    with pytest.raises(ConfigError, match=r"needs offline responses: set data\.responses"):
        load_config("tiny", overrides)
    responses = ["--data.responses", str(tmp_path / "none.parquet"), "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"^data\.responses: .*does not exist"):
        preflight.prepare(load_config("tiny", [*overrides, *responses]))


@pytest.mark.parametrize(
    ("method", "source", "state", "target"),
    [
        ("opdlm", "student", "per_block", "teacher"),
        ("opdlm_off", "student", "random", "teacher"),
        ("off_policy_distillation", "offline", "random", "teacher"),
        ("sft", "offline", "random", "hard"),
    ],
)
def test_methods_by_name(method, source, state, target):
    objective = run_config(data={"prompts": "p", "responses": "r"}, objective={"method": method}).objective
    assert (objective.source.kind, objective.state.kind, objective.target.kind) == (source, state, target)
    assert ObjectiveConfig.model_validate(objective.model_dump()) == objective


@pytest.mark.parametrize(
    ("method", "source", "kind"),
    [
        ("kd", "offline", "forward_kl"),
        ("offline_rl", "offline", "reverse_kl"),
        ("dagger", "student", "forward_kl"),
        ("opd", "student", "reverse_kl"),
    ],
)
def test_all_four_cells_of_prefixes_and_divergences(method, source, kind):
    objective = ObjectiveConfig(method=method)
    assert (objective.source.kind, objective.divergence.kind, objective.target.kind) == (source, kind, "teacher")
    other = "forward_kl" if kind == "reverse_kl" else "reverse_kl"
    with pytest.raises(ValueError, match=f"method '{method}' means divergence.kind {kind}, but it is '{other}'"):
        ObjectiveConfig(method=method, divergence={"kind": other})


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="has no realised rounds"):
        ObjectiveConfig(source={"kind": "offline"})
    with pytest.raises(ValidationError, match=r"means state\.kind random or complementary, but it is 'per_block'"):
        ObjectiveConfig(method="opdlm_off", state={"kind": "per_block"})


def test_a_mixture_selects_states_by_source(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    full = {"kind": "random", "min_ratio": 1.0, "max_ratio": 1.0}
    objective = ObjectiveConfig(source={"kind": "mixture", "offline_state": full})
    for t in offline(tokenizer):
        select_states(t, objective, BLOCK, tokenizer.eos_token_id, np.random.default_rng(0))
        assert t.masked_offsets.tolist() == list(range(len(t.response_ids) + len(t.tail_ids)))


@pytest.mark.parametrize("target", ["teacher", "hard"])
@pytest.mark.parametrize("weight", ["one", "inverse_t"])
def test_the_loss_on_offline_responses_equals_the_direct_loop(model_and_tokenizer, target, weight):
    model, tokenizer = model_and_tokenizer
    method = "sft" if target == "hard" else "off_policy_distillation"
    objective = ObjectiveConfig(method=method, weight=weight)
    rows = offline(tokenizer)
    for t in rows:
        select_states(t, objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    build = builder(tokenizer, model, target_kind="none" if target == "hard" else "hidden")
    if target == "teacher":
        set_targets(model, rows)
    (micro,), _ = build.update(rows, 0, 1)
    x = build.tensors(micro, rows)
    model.zero_grad()
    hidden = hidden_states(model, x.ids, x.positions, x.mask)
    rows_of = hidden.reshape(-1, hidden.shape[-1])[x.loss_index]
    head = model.lm_head.weight
    loss = ChunkedDivergence.apply(rows_of, head, x.target, x.coefficient, objective.divergence, 5, empty_sums(CPU))
    loss.backward()
    fast = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    slow = direct_loss(model, rows, tokenizer.mask_token_id, hard=target == "hard")
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), abs=2e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fast[name], parameter.grad, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_samplers_engine_answers_many_as_one_and_is_seeded(tmp_path, temperature):
    config = load_config("tiny", ["--teacher.max_batched_tokens", "512"]).teacher
    path = tiny_qwen3(tmp_path, seed=3)
    eos = load_tokenizer(path).eos_token_id
    lengths = (3, 30, 12, 7)
    requests = [ResponseRequest(i, 0, np.arange(10, 10 + n, dtype=np.int32)) for i, n in enumerate(lengths)]
    sampling = Sampling(12, temperature, 1.0, [eos])
    engine = SamplerEngine(config, path)
    together = [ids.tolist() for ids in engine.respond(requests, sampling, seed=5)]
    assert together == [ids.tolist() for ids in engine.respond(requests, sampling, seed=5)]
    for ids in together:
        assert 1 <= len(ids) <= 12 and eos not in ids[:-1]
    if temperature == 0:
        assert together == [engine.respond([r], sampling, seed=5)[0].tolist() for r in requests]
    else:
        assert together != [ids.tolist() for ids in engine.respond(requests, sampling, seed=6)]


def test_responses_that_vllm_could_not_read_whole_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(responders, "find_spec", lambda name: True)
    config = load_config("tiny", ["--teacher.max_batched_tokens", "64", "--data.limit", "4"])
    options = {"samples": 1, "max_new_tokens": 56, "temperature": 1.0, "top_p": 1.0, "note": print}
    with pytest.raises(ConfigError, match=r"teacher\.max_batched_tokens: 64 is less than .* use \d{3} or more"):
        respond_module.respond(config, tmp_path / "responses.parquet", **options)
    assert list(tmp_path.iterdir()) == []
