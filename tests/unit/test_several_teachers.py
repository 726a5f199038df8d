"""Several teachers by domain: which one a prompt has, the loss on a micro-batch of both, and what is refused."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.rollout import RolloutActor
from actors.teacher.actor import annotate, build_backend
from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.fingerprint import fingerprint
from common.config.model import ModelConfig
from common.config.objective import ObjectiveConfig
from common.config.run import RunConfig
from common.config.teacher import TeacherConfig
from common.config.unmasking import DynamicUnmasking
from common.conversion import TeacherHead, student_of, teacher_heads_of
from common.prompts import Prompt
from common.student import load_model
from common.trajectory import from_batch, to_batch
from deploy.checkpoints import RunState
from deploy.commands.dry_run import _teacher_pools
from deploy.placement import plan
from deploy.preflight import prepare
from deploy.run_cost import RunCost
from learner.batches import BatchBuilder, of_heads
from learner.objective import empty_sums
from learner.records import RecordReader
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3

BLOCK = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student, and a teacher for math of its size and a wider one for all else."""
    folder = tmp_path_factory.mktemp("models")
    return (
        tiny_qwen3(folder / "student", seed=0),
        tiny_qwen3(folder / "math", seed=1),
        tiny_qwen3(folder / "other", seed=2, hidden=96),
    )


def several(folders, *overrides: str):
    student, math, other = folders
    teachers = f"[{{path: {math}, domains: [math], backend: transformers, dtype: float32}}, {{path: {other}}}]"
    return load_config("tiny", ["--model.path", student, "--teacher", teachers, *overrides])


def test_a_list_is_the_first_teacher_with_the_others_and_takes_its_fields(folders, tmp_path):
    config = several(folders, "--teacher.max_wait_ms", "7")
    assert config.teacher_paths == {"teacher.path": folders[1], "teacher.others.0.path": folders[2]}
    assert [t.backend for t in config.teacher.pools.values()] == ["transformers"] * 2
    assert [t.max_wait_ms for t in config.teacher.pools.values()] == [7, 7]
    assert [config.teacher_of(domain) for domain in ("math", "code", "")] == [0, 1, 1]
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: deploy/models/tiny-arlm}\ndata: {prompts: q.jsonl}\n"
        "teacher: [{domains: [a], backend: transformers}, {domains: [b]}]\n"
    )
    from_file = load_config(str(file), ["--teacher.actors", "3"])
    assert [t.actors for t in from_file.teacher.pools.values()] == [3, 3]
    assert [from_file.teacher.serving(domain) for domain in ("a", "b", "c")] == [0, 1, None]


def test_who_teaches_what_is_part_of_the_training(folders):
    config = several(folders)
    moved = config.teacher.others[0].model_copy(update={"path": "elsewhere", "actors": 5})
    one = config.model_copy(update={"teacher": config.teacher.model_copy(update={"others": (moved,)})})
    assert fingerprint(one) == fingerprint(config)  # neither a path nor the number of processes is
    other = moved.model_copy(update={"domains": ("code",)})
    two = config.model_copy(update={"teacher": config.teacher.model_copy(update={"others": (other,)})})
    assert fingerprint(two) != fingerprint(config)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ("[{domains: [a]}, {domains: [a]}]", r"teacher: others.0.domains: 'a' is also domains"),
        ("[{}, {}]", r"others.0.domains: empty, for all other domains, is also domains"),
        ("[{target: hidden, domains: [a]}, {target: topk}]", r"others.0.target \('topk'\) is not that of the first"),
        ("[{domains: [a]}, {dtype: bfloat16, dtpe: x}]", r"teacher.others.0.dtpe: unknown field"),
        ("[]", r"teacher: expected fields below it"),
    ],
)
def test_teachers_that_do_not_go_together(teachers, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", ["--teacher", teachers])


def test_every_domain_needs_a_teacher(folders, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"question": "what {i}", "domain": "{d}"}}\n' for i, d in enumerate(["math", "code"])))
    common = ["--data.prompts", str(file), "--rollout.prompts_per_batch", "2", "--output_dir", str(tmp_path)]
    common += ["--ray.num_cpus", "8"]
    options = [*common, "--evaluation.teacher", "false"]
    said = prepare(several(folders, *options, "--teacher.others", "[{domains: [code, prose]}]")).warnings
    assert "teacher.others.0.domains: no prompt to train on has the domain 'prose'" in said
    with pytest.raises(ConfigError, match=r"teacher.domains: 'what 1' of data.prompts has domain 'code', .* for math"):
        prepare(several(folders, *options, "--teacher.others", "[]"))
    assert prepare(several(folders, *options)).prompts.read == 2


def test_processes_of_all_pools_are_planned_and_shown(folders):
    config = several(folders, "--teacher.actors", "2")
    placement = plan(config)
    assert [(p.index, p.pool) for p in placement.processes if p.role == "teacher"] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert _teacher_pools(config, placement) == [
        "2 teacher pools:",
        f"  teacher-0, teacher-1: {folders[1]} for math",
        f"  teacher-2, teacher-3: {folders[2]} for all other domains",
    ]
    narrow, wide = RunCost.of(config, placement).teacher_parameters
    state = RunState(response_tokens=30, other_teachers_tokens={"1": 10})
    assert RunCost.of(config, placement).metrics(state)["flops/teacher"] == 2 * (narrow * 20 + wide * 10)
    assert wide > narrow


@pytest.fixture(scope="module")
def rolled_out(folders):
    """Trajectories of two domains, from a rollout actor; one record batch holds those of one teacher."""
    config = several(folders, "--rollout.stream_rows", "2", "--rollout.dtype", "float32")
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(i, "q", rng.integers(10, 200, 5 + i).astype(np.int32), domain)
        for i, domain in enumerate(["math", "code", "math", "math", "", "code"])
    ]
    streamed = list(RolloutActor(config, 0).rollout(prompts, 8, BLOCK, DynamicUnmasking(threshold=0.3)))[::2]
    return config, streamed


def test_record_batches_are_of_one_teacher(rolled_out):
    config, streamed = rolled_out
    served = [{config.teacher_of(t.domain) for t in from_batch(batch)[0]} for batch in streamed]
    assert all(len(one) == 1 for one in served) and sorted(n for one in served for n in one) == [0, 0, 1, 1]


def annotated(config, streamed) -> list[pa.RecordBatch]:
    """The record batches as the pools of both teachers give them back."""
    backends = [build_backend(own.teacher, own.teacher_path) for own in config.by_teacher]
    batches = []
    for batch in streamed:
        rows, meta = from_batch(batch)
        backend = backends[config.teacher_of(rows[0].domain)]
        annotate(backend, rows)
        batches.append(to_batch(rows, replace(meta, target_kind="hidden", target_width=backend.width)))
    return batches


def test_the_loss_is_that_of_each_position_with_its_own_teacher(folders, rolled_out):
    """In float64, with gradients: a loop over trajectories and positions, against the packed micro-batch of both."""
    config, streamed = rolled_out
    conversion = student_of(config)
    rows, meta = RecordReader(config, conversion).read(annotated(config, streamed))
    student = load_model(folders[0], torch.float64, "sdpa")
    heads = tuple(TeacherHead(h.weight.double(), h.tokens) for h in teacher_heads_of(config, conversion, "cpu"))
    build = BatchBuilder.of(config, meta, attention="sdpa", device=torch.device("cpu"), **of_heads(heads))
    sums = empty_sums(torch.device("cpu"))
    for t in rows:
        t.hidden = t.hidden.astype(np.float64)
    (micro,), positions = build.update(rows, 0, 1)
    batch = build.tensors(micro, rows)
    loss = TrainingModule(student, config.model_copy(update={"objective": ObjectiveConfig()}))(batch, sums)
    loss.backward()
    packed = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    wanted, counted = 0.0, 0
    for t in rows:
        head = heads[config.teacher_of(t.domain)].weight
        targets = torch.from_numpy(t.hidden.reshape(len(t.target_offsets), -1))
        own = []
        for block in np.unique((len(t.prompt_ids) + t.masked_offsets) // BLOCK):
            x = torch.from_numpy(t.x0[: (block + 1) * BLOCK].astype(np.int64))
            at = len(t.prompt_ids) + t.masked_offsets
            here = at[at // BLOCK == block]
            x[torch.from_numpy(here.astype(np.int64))] = conversion.config.mask_token_id
            of = torch.arange(len(x)) // BLOCK
            hidden = student.model(
                input_ids=x[None], attention_mask=(of[:, None] >= of[None])[None, None], use_cache=False
            ).last_hidden_state[0]
            for offset in here - len(t.prompt_ids):
                if t.loss_weight[list(t.masked_offsets).index(offset)] == 0:
                    continue
                teacher = (targets[list(t.target_offsets).index(offset)] @ head.T).log_softmax(-1)
                log_p = (student.lm_head.weight @ hidden[len(t.prompt_ids) + offset]).log_softmax(-1)
                own.append((teacher.exp() * (teacher - log_p)).sum())
        counted += len(own)
        wanted = wanted + torch.stack(own).mean() / len(rows)
    wanted.backward()
    assert counted == positions
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)  # coefficients are float32
    for name, p in student.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_targets_of_another_width_than_the_teachers_are_refused(rolled_out):
    config, streamed = rolled_out
    batches = annotated(config, streamed)
    assert {from_batch(b)[1].target_width for b in batches} == {64, 96}
    rows, meta = from_batch(batches[0])
    rows = [replace(t, ordinal=t.ordinal + 100, hidden=np.zeros(len(t.target_offsets) * 32, np.float32)) for t in rows]
    wrong = to_batch(rows, replace(meta, target_width=32))
    with pytest.raises(ValueError, match="target_width"):
        RecordReader(config, student_of(config)).read([*batches, wrong])


def test_held_out_prompts_are_compared_with_their_own_teacher(folders):
    """Of two teachers, each part as if it were the only one."""
    config = several(folders, "--evaluation.held_out_prompts", "2", "--rollout.dtype", "float32")
    rng = np.random.default_rng(1)
    prompts = [Prompt(i, "q", rng.integers(10, 200, 7).astype(np.int32), d) for i, d in enumerate(["code", "math"])]
    paths = list(config.teacher_paths.values())
    actor = RolloutActor(config, 0)
    responses = actor.answer_held_out(prompts, 8, paths)
    kl = actor.held_out_kl(prompts, responses, paths, BLOCK).kl
    for row, own in ((0, config.by_teacher[1]), (1, config.by_teacher[0])):
        own = own.model_copy(update={"teacher": own.teacher.model_copy(update={"domains": ()})})
        alone = RolloutActor(own, 0)
        assert alone.answer_held_out([prompts[row]], 8, [own.teacher_path])[0].tolist() == responses[row].tolist()
        one = alone.held_out_kl([prompts[row]], [responses[row]], [own.teacher_path], BLOCK).kl
        np.testing.assert_allclose(kl[row], one[0], rtol=1e-5)


def test_one_teacher_may_be_given_as_its_own_section():
    teacher = TeacherConfig(backend="transformers", target="topk")
    config = RunConfig(model=ModelConfig(path="m"), data=DataConfig(prompts="p"), teacher=teacher)
    assert (config.teacher.backend, config.teacher.target, config.teacher.others) == ("transformers", "topk", ())
    assert RunConfig(model=ModelConfig(path="m"), data=DataConfig(prompts="p"), teacher=config.teacher) == config
