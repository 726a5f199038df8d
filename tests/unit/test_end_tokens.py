"""All end tokens of a model, wherever they are named, end a response wherever one is made or read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from actors.evaluation.autoregressive import evaluate_autoregressive, load_autoregressive
from actors.evaluation.evaluation import evaluate_shard
from actors.evaluation.generation import load_student, sampler_of
from actors.responder import ResponseRequest, SamplerEngine, Sampling
from actors.rollout import RolloutActor
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.objective import ObjectiveConfig
from common.config.run import RunConfig
from common.config.teacher import TeacherConfig
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert, convert_folder
from common.end_tokens import end_token_ids, response_text
from common.model_files import ModelError
from common.prompts import Prompt
from common.responses import load_responses
from common.seeds import state_rng
from common.states import select_states
from common.student import load_model, load_tokenizer
from tests.models import tiny_qwen3, tiny_tokenizer

PAD, START, END = 256, 257, 258  # of the tiny tokenizer
TURN, MORE = 262, 263  # its further tokens, here
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AS_PARTS = TEMPLATE.replace("m.content", "m.content[0].text")
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
TRIMS = TEMPLATE.replace("m.content", "m.content | trim")
NEXT_TURN = "{% for m in messages %}{{ '<turn>' + m.role + m.content }}{% endfor %}"  # as GLM
ONLY_USER = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "eos", "listed", "expected"),
    [
        (TEMPLATE, "<|im_end|>", END, (TURN, END)),  # Llama 3: only the template knows
        (TEMPLATE, "<|im_end|>", [END, MORE], (TURN, END, MORE)),
        (TEMPLATE, "<|im_end|>", [TURN], (TURN, END)),
        (TEMPLATE, "<turn>", None, (TURN,)),
        (TEMPLATE, None, None, (TURN,)),
        (AS_PARTS, "<|im_end|>", None, (TURN, END)),
        (NEEDS_SYSTEM, "<|im_end|>", None, (TURN, END)),
        (TRIMS, "<|im_end|>", None, (TURN, END)),
        (NEXT_TURN, "<|im_end|>", [END, TURN], (TURN, END)),
        (ONLY_USER, "<|im_end|>", [MORE], (END, MORE)),
        (None, "<|im_end|>", [MORE, END], (END, MORE)),  # a base model
        (None, "<|im_end|>", 9999, (END,)),  # another model's number
    ],
)
def test_the_end_tokens(template, eos, listed, expected):
    tokenizer = tiny_tokenizer("<turn>", "<more>", eos=eos, chat_template=template)
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=listed)) == expected


def test_named_end_tokens():
    tokenizer = tiny_tokenizer("<turn>", "<more>", chat_template=NEXT_TURN)
    with pytest.raises(ModelError, match="writes no end token behind an answer"):
        end_token_ids(tokenizer, GenerationConfig())
    assert end_token_ids(tokenizer, GenerationConfig(), ["<more>", "<turn>", "<more>"]) == (MORE, TURN)
    with pytest.raises(ModelError, match=r"has no token '<nope>', which model.end_tokens names"):
        end_token_ids(tokenizer, GenerationConfig(), ["<nope>"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose template ends a turn with a token that nothing else names; it writes it, and its eos, often."""
    path = tmp_path_factory.mktemp("two-ends") / "model"
    tokenizer = tiny_tokenizer("<turn>", "<more>", "<|mask|>", chat_template=TEMPLATE, mask_token="<|mask|>")
    tiny_qwen3(path, seed=3, tokenizer=tokenizer, vocab=265, tied=False)
    model = load_model(str(path), torch.float32, "sdpa")
    with torch.no_grad():  # the last hidden states have a norm of about 8
        head = model.get_output_embeddings().weight
        head[[TURN, END]] += 3 * head.std() * torch.randn(2, head.shape[1], generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def student(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("two-ends") / "student"
    convert_folder(model, out, 4, "auto", torch.float32)
    return str(out)


PROMPTS = [Prompt(i, f"q{i}", np.array([START, 10 + i, 20, 30], np.int32), answer="1") for i in range(24)]


def ends_rightly(responses) -> None:
    """Every response stops at its first end token, and both tokens have ended some."""
    for ids in responses:
        assert not np.isin(ids[:-1], [TURN, END]).any(), ids
    assert {int(ids[-1]) for ids in responses} >= {TURN, END}


def test_a_checkpoint_records_them(model, student):
    assert json.loads((Path(student) / "config.json").read_text())["end_token_ids"] == [TURN, END]
    assert json.loads((Path(student) / "generation_config.json").read_text())["eos_token_id"] == [TURN, END]
    again = convert(student, 4)
    assert again.end_tokens == (TURN, END)
    assert convert(model, 4, end_tokens=["<more>"]).end_tokens == (MORE,)
    assert convert(student, 4, end_tokens=["<more>"]).end_tokens == (MORE,)


def test_what_a_checkpoint_records_is_all(model, tmp_path):
    """A token that was left out on purpose does not come back from the tokenizer."""
    convert_folder(model, tmp_path / "student", 4, "auto", torch.float32, ["<turn>"])
    assert convert(str(tmp_path / "student"), 4).end_tokens == (TURN,)
    loaded, tokenizer = load_student(str(tmp_path / "student"), "float32", "cpu")
    assert sampler_of(loaded, tokenizer, block_size=None, slots=1).eos_token_id == [TURN]


def test_rollouts_and_generation_end_at_any(student):
    sampler = sampler_of(*load_student(student, "float32", "cpu"), block_size=None, slots=4)
    requests = [Request(p.ordinal, 0, p.ids, 40) for p in PROMPTS]
    made = list(sampler.generate(requests, Decoding(DynamicUnmasking(), 1.0)))
    ended = [t.response_ids for t in made if t.finish_reason == "eos"]
    ends_rightly(ended)
    assert all(len(t.response_ids) == 40 for t in made if t.finish_reason == "length")


def test_a_rollout_actor_ends_at_those_of_the_run(model, tmp_path):
    """With another teacher, also at what ends the teacher's turns."""
    teacher = Path(shutil.copytree(model, tmp_path / "teacher"))
    (teacher / "chat_template.jinja").write_text(TEMPLATE.replace("<turn>", "<more>"))
    settings = {"model": {"path": model}, "data": {"prompts": "unused"}, "rollout": {"dtype": "float32"}}
    assert RolloutActor(RunConfig(**settings), 0).sampler.eos_token_id == (TURN, END)
    both = RolloutActor(RunConfig(**settings, teacher={"path": str(teacher)}), 0)
    assert both.sampler.eos_token_id == (TURN, END, MORE)
    settings["model"]["end_tokens"] = ["<|im_end|>"]
    assert RolloutActor(RunConfig(**settings, teacher={"path": str(teacher)}), 0).sampler.eos_token_id == (END,)


def test_the_teacher_is_evaluated_with_those_of_the_run(model, tmp_path):
    """Also where its own files name none of them, which would be refused without model.end_tokens."""
    path = Path(shutil.copytree(model, tmp_path / "model"))
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    settings = {"data": {"prompts": "unused"}, "rollout": {"dtype": "float32"}}
    named = {"path": str(path), "end_tokens": ["<turn>", "<|im_end|>"]}
    found = RolloutActor(RunConfig(**settings, model=named), 0).evaluate_teacher(PROMPTS, 40)
    expected = RolloutActor(RunConfig(**settings, model={"path": model}), 0).evaluate_teacher(PROMPTS, 40)
    assert found.counts.tolist() == expected.counts.tolist()
    with pytest.raises(ModelError, match="writes no end token"):
        RolloutActor(RunConfig(**settings, model={"path": str(path)}), 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_teacher_responses_end_at_any(model, temperature):
    engine = SamplerEngine(TeacherConfig(dtype="float32"), model)
    requests = [ResponseRequest(p.ordinal, 0, p.ids) for p in PROMPTS]
    made = engine.respond(requests, Sampling(40, temperature, 1.0, [TURN, END]), seed=0)
    ends_rightly([ids for ids in made if len(ids) < 40])


def test_evaluation_ends_at_any(model, student):
    """The student and the autoregressive model; greedy, as responses would go on without."""
    ar, tokenizer = load_autoregressive(model, "cpu")
    assert ar.generation_config.eos_token_id == [TURN, END]
    teacher = evaluate_autoregressive(ar, tokenizer, PROMPTS, 40).metrics()
    ar.generation_config.eos_token_id = [END]
    assert evaluate_autoregressive(ar, tokenizer, PROMPTS, 40).metrics()["share_ended"] < teacher["share_ended"]
    loaded, tokenizer = load_student(student, "float32", "cpu")
    found = evaluate_shard(
        sampler_of(loaded, tokenizer, block_size=None, slots=4), tokenizer, PROMPTS, Decoding(temperature=0.0), 40
    ).metrics()
    loaded.generation_config.eos_token_id = [END]
    alone = evaluate_shard(
        sampler_of(loaded, tokenizer, block_size=None, slots=4), tokenizer, PROMPTS, Decoding(temperature=0.0), 40
    ).metrics()
    assert alone["share_ended"] < found["share_ended"]


def test_a_penalty_in_the_generation_config_is_no_part_of_greedy_decoding(model, tmp_path):
    """Qwen2.5 ships a repetition penalty; the teacher's distribution has none."""
    path = Path(shutil.copytree(model, tmp_path / "model"))
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 5.0}))
    plain, penalised = (load_autoregressive(str(p), "cpu")[0] for p in (model, path))
    ids = torch.tensor([[START, 10, 20, 30]])
    assert torch.equal(plain.generate(ids, max_new_tokens=20), penalised.generate(ids, max_new_tokens=20))
    request, sampling = [ResponseRequest(0, 0, PROMPTS[0].ids)], Sampling(20, 0.0, 1.0, [TURN, END])
    plain_engine, engine = (SamplerEngine(TeacherConfig(dtype="float32"), str(p)) for p in (model, path))
    expected, found = (e.respond(request, sampling, 0)[0].tolist() for e in (plain_engine, engine))
    assert expected == found


def test_offline_responses_get_the_token_that_ends_a_turn(model, tmp_path):
    from common.config.data import DataConfig

    file = tmp_path / "responses.jsonl"
    records = [{"question": "q", "response": "ab"}, {"question": "q", "response": "a<|im_end|>b"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data, tokenizer = DataConfig(prompts="unused", responses=str(file)), load_tokenizer(model)
    text = tokenizer("ab", add_special_tokens=False)["input_ids"]
    read = load_responses(data, tokenizer, [Prompt(0, "q", PROMPTS[0].ids)], (TURN, END))["q"]
    assert [ids.tolist() for ids in read] == [[*text, TURN], [text[0], END]]


@pytest.mark.parametrize("last", [TURN, END])
def test_any_is_left_out_of_the_loss_where_asked(student, last):
    sampler = sampler_of(*load_student(student, "float32", "cpu"), block_size=None, slots=4)
    requests = [Request(p.ordinal, 0, p.ids, 40) for p in PROMPTS]
    made = list(sampler.generate(requests, Decoding(DynamicUnmasking(), 1.0)))
    trajectory = next(t for t in made if t.response_ids[-1] == last and len(t.response_ids) > 1)
    for exclude in (False, True):
        objective = ObjectiveConfig(state={"kind": "all_rounds"}, exclude_eos=exclude)
        select_states(trajectory, objective, 4, (TURN, END), state_rng(0, 0, 0))
        trained = trajectory.masked_offsets[trajectory.loss_weight > 0]
        assert (len(trajectory.response_ids) - 1 in trained) is not exclude


def test_the_text_of_a_response_has_no_end_token():
    """Also where it is a token like any other, which decoding would write."""
    tokenizer = tiny_tokenizer(chat_template=None)
    ids = np.array(tokenizer("done!", add_special_tokens=False)["input_ids"], np.int32)
    assert response_text(tokenizer, ids, [int(ids[-1])]) == "done"
    assert response_text(tokenizer, ids, [END]) == "done!"
