"""The real learner with adapters: only A and B are stepped, published and saved, whole or partitioned."""

from dataclasses import replace

import pytest
import ray
import torch
from safetensors import safe_open

from common.config.run import RunConfig
from common.config.teacher import TeachersConfig
from common.conversion import convert, load_converted, merge_folder
from common.lora import MergedWeights, adapter_parameters, add_adapters, load_adapters
from common.model_files import ModelError
from common.student import hidden_states, load_model, noised_masks
from common.trajectory import to_batch
from common.weights.object_store import ObjectStoreTransport
from learner.batches import BatchBuilder
from learner.objective import ChunkedDivergence, empty_sums
from learner.schedule import RunUpdates, learning_rate
from tests.integration.test_learner import PARTITIONED, config, refs_of, rows_of, started_ranks
from tests.models import tiny_qwen3

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
UPDATES = RunUpdates(warmup=0, total=6)


def adapted(path: str, ranks: int, deepspeed: dict, gate: str) -> RunConfig:
    plain = config(path, ranks, deepspeed)
    context = {"context": "causal" if gate == "mask" else "block"}
    return RunConfig(**plain.model_dump() | {"adapter": {"rank": 4, "alpha": 8, "gate": gate}, "attention": context})


def published_by(actors: list) -> dict[str, torch.Tensor]:
    handle = next(h for h in ray.get([a.publish.remote(1) for a in actors]) if h)
    return {name: tensor.clone() for name, tensor in ObjectStoreTransport().fetch(handle)}


def reference(settings: RunConfig, path: str) -> tuple[dict[str, torch.Tensor], float]:
    """A and B after the updates of one rollout batch in one plain process, and the mean loss."""
    rows, meta = rows_of(path)
    model = load_converted(path, convert(path, 4), torch.float32, "sdpa")
    add_adapters(model, settings.adapter)
    head = load_model(path, torch.float32, "sdpa").lm_head.weight.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    builder = BatchBuilder.of(settings, meta, attention="sdpa", device=torch.device("cpu"), teacher_head=head)
    losses = []
    for update, share in enumerate((rows[:4], rows[4:])):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = learning_rate(settings.learner, update, UPDATES)
        batches, _ = builder.update(share, 0, 1)
        losses.append(0.0)
        for batch in batches:
            x = builder.tensors(batch, share)
            hidden = hidden_states(model, x.ids, x.positions, x.mask, noised_masks(model, x.ids, x.copy))
            states = hidden.reshape(-1, hidden.shape[-1])[x.loss_index]
            kind, sums = settings.objective.divergence, empty_sums(torch.device("cpu"))
            loss = ChunkedDivergence.apply(states, model.lm_head.weight, x.target, x.coefficient, kind, 1024, sums)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, settings.learner.grad_clip)
        optimizer.step()
    return {name: p.detach() for name, p in adapter_parameters(model).items()}, sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("deepspeed", "gate"),
    [({}, "mask"), pytest.param(PARTITIONED, "none", marks=pytest.mark.long)],
    ids=["whole", "partitioned"],
)
def test_adapters_train_publish_save_and_resume(tmp_path, ray_local, deepspeed, gate):
    path = tiny_qwen3(tmp_path / "model", seed=1)
    ranks = 2
    settings = adapted(path, ranks, deepspeed, gate)
    refs = refs_of(path)
    first = started_ranks(settings)
    result = ray.get([a.train.remote(refs, 0, UPDATES) for a in first])[0]
    expected, loss = reference(settings, path)
    assert result["loss"] == pytest.approx(loss, rel=2e-3)
    published = published_by(first)
    assert published.keys() == expected.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")

    ray.get([a.save.remote(tmp_path / "saved", tmp_path / "resume") for a in first])
    ray.get([a.written.remote() for a in first])
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    with safe_open(tmp_path / "resume" / "rank-00000.safetensors", "pt") as shard:
        elements = sum(shard.get_tensor(n).numel() for n in shard.keys() if n.endswith("weights"))  # noqa: SIM118
    assert elements <= sum(p.numel() for p in published.values()) / ranks + len(published)
    check_saved(tmp_path, path, published, settings)

    more = ray.get([a.train.remote(refs, 2, UPDATES) for a in first])[0]["loss"]
    after = published_by(first)
    for actor in first:
        ray.kill(actor)
    second = started_ranks(settings)
    ray.get([a.load.remote(tmp_path / "resume") for a in second])
    assert ray.get([a.train.remote(refs, 2, UPDATES) for a in second])[0]["loss"] == more
    assert all(torch.equal(a, b) for a, b in zip(after.values(), published_by(second).values(), strict=True))
    for actor in second:
        ray.kill(actor)
    if gate == "mask":
        check_own_teacher(path, settings, result)


def check_own_teacher(path: str, settings: RunConfig, expected: dict[str, float]) -> None:
    """Without targets in the record batches, the clean tokens give the same losses and gradients."""
    own = settings.model_copy(update={"teacher": TeachersConfig(backend="self", dtype="float32")})
    own = RunConfig(**own.model_dump())
    rows, meta = rows_of(path)
    for t in rows:
        t.hidden = t.hidden[:0]
    actors = started_ranks(own)
    refs = [ray.put(to_batch(rows, replace(meta, target_kind="none", target_width=0)))]
    result = ray.get([a.train.remote(refs, 0, UPDATES) for a in actors])[0]
    for name in ("loss", "kl", "grad_norm", "teacher_agreement", "trained_positions"):
        assert result[name] == pytest.approx(expected[name], rel=1e-4), name
    for actor in actors:
        ray.kill(actor)


def check_saved(tmp_path, path: str, published: dict[str, torch.Tensor], settings: RunConfig) -> None:
    """What a rollout actor makes of the published adapter is what the folder is, and its merged form."""
    saved = str(tmp_path / "saved")
    sampled = load_converted(path, convert(path, 4), torch.float32, "sdpa")
    loaded = load_model(saved, torch.float32, "sdpa")
    if settings.adapter.gated:
        add_adapters(sampled, settings.adapter)
        load_adapters(sampled, published.items())
        with pytest.raises(ModelError, match="is an adapter with the gate 'mask', which acts at mask positions only"):
            merge_folder(saved, tmp_path / "merged", torch.float32)
        assert not (tmp_path / "merged").exists()
    else:
        MergedWeights(sampled, settings.adapter).load(sampled, published.items())
        merge_folder(saved, tmp_path / "merged", torch.float32)
        merged = load_model(str(tmp_path / "merged"), torch.float32, "sdpa")
        assert merged.config.mask_token_id == loaded.config.mask_token_id
        assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), sampled.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), sampled.parameters(), strict=True))
