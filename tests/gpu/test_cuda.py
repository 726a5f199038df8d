"""The CUDA paths against the CPU's: graphs, grouped attention, FlexAttention with packed documents.

Needs torch, transformers, pydantic, pyarrow and a CUDA device; neither ray, deepspeed nor vllm.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from actors.evaluation.held_out import HeldOutTargets
from actors.sampler.attention import slot_attention_reference
from actors.sampler.autoregressive import AutoregressiveSampler, token_by_token
from actors.sampler.cache import AttentionInputs
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.divergences import ForwardKL
from common.config.objective import ObjectiveConfig
from common.config.unmasking import DynamicUnmasking, SpeculativeUnmasking, StaticUnmasking
from common.masks import dense_mask, flex_mask
from common.seeds import state_rng
from common.states import select_states
from common.student import full_precision_logits, hidden_states, load_model
from common.trajectory import Trajectory, TrajectoryMeta
from learner.batches import BatchBuilder
from learner.liger import use_liger_kernels
from learner.objective import ChunkedDivergence, empty_sums
from tests.adapters import with_adapters
from tests.models import FAMILIES, tiny_family, tiny_qwen3
from tests.trajectories import packed_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EOS, BLOCK = 7, 4
ARLM = "deploy/models/tiny-arlm"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.backends.cuda.matmul.allow_tf32 = False
    return tiny_qwen3(tmp_path_factory.mktemp("model"), seed=2, hidden=128, heads=4, kv_heads=2)


def requests(count: int = 24) -> list[Request]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, count)
    return [Request(i, 0, rng.integers(8, 250, size=n), 40) for i, n in enumerate(lengths)]


def rollouts(path, device, dtype=torch.float32, decoding=None, **options):
    model = load_model(path, dtype, "sdpa").to(device)
    mask = model.config.vocab_size - 1
    sampler = Sampler(model, block_size=BLOCK, mask_token_id=mask, eos_token_id=EOS, slots=16, seed=5, **options)
    decoding = decoding or Decoding(DynamicUnmasking(threshold=0.2), 1.0)
    first = {t.ordinal: t for t in sampler.generate(requests(), decoding)}
    again = {t.ordinal: t for t in sampler.generate(requests(), decoding)}  # now from graphs
    return model, first, again


@pytest.mark.parametrize("compiled", [True, False])
def test_autoregressive_decoding_is_the_greedy_loop(path, compiled):
    """The second round comes from graphs; beside the sampler the model still gives its own causal forward."""
    model = load_model(path, torch.float32, "sdpa").to("cuda")
    sampler = AutoregressiveSampler(model, eos_token_id=EOS, slots=16, seed=0, compiled=compiled)
    for _ in range(2):
        found = {t.ordinal: t.response_ids.tolist() for t in sampler.generate(requests(), token_by_token(0.0))}
    for request in requests()[::6]:
        ids = torch.tensor([request.prompt_ids.tolist()], device="cuda")
        for token in found[request.ordinal]:
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-3  # near ties may go either way
            ids = torch.cat([ids, torch.tensor([[token]], device="cuda")], dim=1)
    assert all(len(ids) == 40 or ids[-1] == EOS for ids in found.values())


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(StaticUnmasking(), 0.0),
        Decoding(DynamicUnmasking(threshold=0.2), 1.0),
        Decoding(DynamicUnmasking(threshold=0.5, revise=0.02), 1.0),
    ],
    ids=["static-greedy", "dynamic-sampled", "revised"],
)
def test_graphs_give_the_cpus_trajectories(path, decoding):
    _, cpu, _ = rollouts(path, "cpu", decoding=decoding)
    for options in ({"cuda_graphs": False}, {"cuda_graphs": True}):
        _, first, again = rollouts(path, "cuda", decoding=decoding, **options)
        same = 0
        for ordinal, t in cpu.items():
            assert first[ordinal].response_ids.tolist() == again[ordinal].response_ids.tolist()
            same += first[ordinal].response_ids.tolist() == t.response_ids.tolist()
        assert same >= len(cpu) - 1  # a tie within rounding may fall either way


# groups of two and of three heads, heads as wide as real ones
SHAPES = {
    "pairs": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "threes": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_with_fused_layers_and_gives_the_cpus_trajectories(family, shape, tmp_path):
    path = tiny_family(tmp_path, family, seed=2, **SHAPES[shape])
    decoding = Decoding(StaticUnmasking(), 0.0)
    _, cpu, _ = rollouts(path, "cpu", decoding=decoding)
    _, first, again = rollouts(path, "cuda", decoding=decoding)
    assert Sampler(
        load_model(path, torch.float32, "sdpa").cuda(),
        block_size=BLOCK, mask_token_id=1, eos_token_id=EOS, slots=2, seed=5,
    ).cached_model.fused  # fmt: skip
    assert [again[i].response_ids.tolist() for i in cpu] == [first[i].response_ids.tolist() for i in cpu]
    same = sum(first[i].response_ids.tolist() == t.response_ids.tolist() for i, t in cpu.items())
    assert same >= len(cpu) - 2  # a tie within rounding may fall either way


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(9, 3, 64), (14, 2, 64), (16, 8, 128), (32, 8, 128), (4, 1, 256), (8, 4, 256)]
)
@pytest.mark.parametrize("block", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("norms", ["none", "plain", "centred"])
def test_the_attention_kernel_at_real_shapes(heads, kv_heads, width, block, norms):
    """In bfloat16, with commits and long contexts, against the reference in float32."""
    from actors.sampler.kernels.block_attention import Fusion, block_attention_triton

    torch.manual_seed(0)
    first = torch.tensor([5, 0, 9, 4], device="cuda")  # in blocks; the last row commits the block before the first's
    slots, partner = torch.tensor([2, 0, 1, 2], device="cuda"), torch.tensor([3, -1, -1], device="cuda")
    positions = first[:, None] * block + torch.arange(block, device="cuda")
    packed = torch.randn(4, block, heads + 2 * kv_heads, width, device="cuda", dtype=torch.bfloat16)
    query, key, value = (t.transpose(1, 2) for t in packed.split([heads, kv_heads, kv_heads], dim=2))
    angles = positions[..., None] * 100 ** (-torch.arange(0, width, 2, device="cuda") / width)
    cos, sin = (f(torch.cat([angles, angles], -1)).bfloat16() for f in (torch.cos, torch.sin))
    centred, weights = norms == "centred", None
    normed = [query.float(), key.float()]
    if norms != "none":
        weights = tuple((0.1 * torch.randn(2, width, device="cuda") + (not centred)).bfloat16())
        normed = [
            torch.nn.functional.rms_norm(x, (width,), w.float() + centred, 1e-6)
            for x, w in zip(normed, weights, strict=True)
        ]
    rotated = apply_rotary_pos_emb(*normed, cos.float(), sin.float())
    keys, values = torch.randn(2, 3, kv_heads, 16 * block, width, device="cuda", dtype=torch.bfloat16)
    where = (slots, positions, block, width**-0.5, 6 * block, partner)
    exact_keys, exact_values = keys.float(), values.float()
    expected = slot_attention_reference(AttentionInputs(*rotated, value.float(), exact_keys, exact_values, *where))
    got = block_attention_triton(
        AttentionInputs(query, key, value, keys, values, *where), Fusion(cos, sin, weights, 1e-6, centred)
    )
    found, exact = (got.float(), keys.float(), values.float()), (expected, exact_keys, exact_values)
    torch.testing.assert_close(found, exact, atol=5e-2, rtol=5e-2)


def test_a_changed_threshold_needs_no_new_graphs(path):
    model = load_model(path, torch.float32, "sdpa").to("cuda")
    mask = model.config.vocab_size - 1
    sampler = Sampler(model, block_size=BLOCK, mask_token_id=mask, eos_token_id=EOS, slots=8, seed=5, compiled=False)

    def rounds(threshold: float) -> list[list[int]]:
        done = sampler.generate(requests(), Decoding(DynamicUnmasking(threshold=threshold), 1.0))
        return [t.reveal_round.tolist() for t in sorted(done, key=lambda t: t.ordinal)]

    low, high = rounds(0.05), rounds(0.6)
    assert low != high
    assert [rounds(0.05), rounds(0.6)] == [low, high]  # in graphs, whatever the threshold was at the capture
    decodings = [key[-1] for key in sampler._graphs._captured if key[0] != "prompts"]
    assert decodings and all(decoding.unmasking.threshold == 0 for decoding in decodings)
    assert any(key[0] == "prompts" for key in sampler._graphs._captured)


def test_settings_by_request_give_what_each_gives_alone(path):
    """Passes with several settings run without a graph, beside graphs of one setting; blocks are seen in between."""
    settings = [Decoding(StaticUnmasking(), 0.7, 20, 0.9), Decoding(DynamicUnmasking(threshold=0.3), 1.0)]
    alone = {}
    for number, decoding in enumerate(settings):
        _, first, _ = rollouts(path, "cuda", decoding=decoding, compiled=False)
        alone |= {ordinal: t for ordinal, t in first.items() if ordinal % 2 == number}
    model = load_model(path, torch.float32, "sdpa").to("cuda")
    mask = model.config.vocab_size - 1
    sampler = Sampler(model, block_size=BLOCK, mask_token_id=mask, eos_token_id=EOS, slots=8, seed=5, compiled=False)
    mixed = [replace(request, decoding=settings[request.ordinal % 2]) for request in requests()]
    for _ in range(2):
        made, blocks = {}, []
        for ended in sampler.passes(mixed, Decoding()):
            made |= {t.ordinal: t for t in ended}
            blocks += sampler.finished_blocks(range(24))
        same = sum(made[o].response_ids.tolist() == t.response_ids.tolist() for o, t in alone.items())
        assert same >= len(alone) - 1  # a tie within rounding may fall either way
        for block in blocks:
            assert block.ids.tolist() == made[block.ordinal].x0[block.start : block.start + BLOCK].tolist()


def sampled_logprobs(model, rows: list[Trajectory]) -> np.ndarray:
    """The learner's log-probability of every token of the responses, in the state in which it was sampled."""
    meta = TrajectoryMeta(BLOCK, model.config.vocab_size - 1, "test", "hidden", model.config.hidden_size)
    head = model.lm_head.weight.detach()
    build = BatchBuilder(meta, "row_mean", "bucket", 2048, "flex_attention", torch.device("cuda"), head)
    found = [np.full(len(t.response_ids), np.nan) for t in rows]
    for micro in build.update(rows, 0, 1)[0]:
        x = build.tensors(micro, rows)
        with torch.no_grad():
            hidden = hidden_states(model, x.ids, x.positions, x.mask).flatten(0, 1)[x.loss_index]
            logprobs = full_precision_logits(hidden, head).log_softmax(-1).cpu()
        copies, positions = (a.ravel()[micro.loss_index] for a in (micro.copy, micro.positions))
        for i, (doc, copy, position) in enumerate(zip(micro.loss_doc, copies, positions, strict=True)):
            t = rows[doc]
            offset = position - len(t.prompt_ids)
            if t.reveal_round[offset] == copy - 1:
                found[doc][offset] = logprobs[i, t.response_ids[offset]]
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_of_sampler_and_flex_learner(dtype):
    """The shipped model, whose distributions are those of a trained one; in bfloat16 both against float32."""
    _, _, done = rollouts(ARLM, "cuda", dtype)
    rows = [done[i] for i in sorted(done)]
    for t in rows:
        select_states(t, ObjectiveConfig(state={"kind": "all_rounds"}), BLOCK, EOS, state_rng(0, t.ordinal, 0))
        t.hidden = np.zeros(len(t.target_offsets) * 128, np.float32)
    sampled = np.log(np.concatenate([t.confidence[: len(t.response_ids)] for t in rows]))
    model = load_model(ARLM, dtype, "flex_attention").cuda()
    learned, exact = sampled_logprobs(model, rows), sampled_logprobs(model.float(), rows)
    errors = [np.abs(logprobs - exact) for logprobs in (sampled, learned)]
    for name, error in zip(("sampler", "learner"), errors, strict=True):
        print(f"{dtype}, {name}: mean {error.mean():.1e}, 99% {np.quantile(error, 0.99):.1e}, worst {error.max():.1e}")
    if dtype == torch.float32:
        assert errors[0].max() <= 1e-4
    else:
        assert errors[0].mean() <= 1.2 * errors[1].mean()
        assert np.quantile(errors[0], 0.99) <= 1.5 * np.quantile(errors[1], 0.99)


def test_flex_mask_is_the_dense_mask(path):
    batch = packed_rows(0, block_size=4, count=12, longest=60, width=512, rows=2)
    fields = (batch.ids, batch.positions, batch.doc, batch.copy, batch.block)
    ids, positions, doc, copy, block = (torch.from_numpy(a).cuda() for a in fields)
    model = load_model(path, torch.float32, "sdpa").cuda()
    with torch.no_grad():
        dense = hidden_states(model, ids, positions, dense_mask(doc, copy, block))
        model.set_attn_implementation("flex_attention")
        flex = hidden_states(model, ids, positions, flex_mask(doc, copy, block))
    torch.testing.assert_close(dense, flex, atol=1e-4, rtol=1e-4)


def test_chunked_gradients_on_cuda():
    from learner.objective import HiddenTarget, divergence

    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, 50, 64, device="cuda", dtype=torch.float64)
    weight, head = torch.randn(2, 300, 64, device="cuda", dtype=torch.float64)
    coefficient = torch.rand(50, device="cuda", dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    sums = empty_sums(hidden.device)
    ChunkedDivergence.apply(hidden, weight, HiddenTarget(teacher, head), coefficient, ForwardKL(), 16, sums).backward()
    fast = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (coefficient * divergence(ForwardKL(), *HiddenTarget(teacher, head).classes(hidden @ weight.T))).sum().backward()
    torch.testing.assert_close(fast, (hidden.grad, weight.grad))


def test_liger_kernels_change_nothing_but_the_time(path):
    pytest.importorskip("liger_kernel")
    model = load_model(path, torch.float32, "sdpa").cuda()
    ids = torch.randint(8, 250, (2, 64), generator=torch.Generator().manual_seed(0)).cuda()

    def states_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        hidden = model.model(ids).last_hidden_state
        hidden.square().sum().backward()
        return hidden.detach(), model.model.layers[0].mlp.gate_proj.weight.grad.clone()

    plain = states_and_gradient()
    use_liger_kernels(model)
    torch.testing.assert_close(states_and_gradient(), plain, atol=1e-4, rtol=1e-3)


def test_the_held_out_kl_of_a_model_that_decodes_is_that_of_the_cpu(path, tmp_path):
    original = tiny_qwen3(tmp_path, seed=3)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(8, 250, 3 + n, np.int32), rng.integers(8, 250, 1 + 2 * n, np.int32)) for n in range(12)]
    found = []
    for device in ("cpu", "cuda"):
        model, _, _ = rollouts(path, device)  # on CUDA packed and compiled
        targets = HeldOutTargets(load_model(original, torch.float32, "sdpa").to(device), pairs, rows=288)
        with torch.compiler.set_stance("force_eager"):
            found.append(targets.sums(model, block_size=BLOCK, mask_token_id=287))
    assert (found[0].tokens == found[1].tokens).all()
    np.testing.assert_allclose(found[1].kl, found[0].kl, rtol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_verified_decoding_gives_the_cpus_text(rounds, gated, tmp_path):
    """With a gated adapter it is the text without one."""
    path = tiny_family(tmp_path, "qwen3", seed=2)
    made = {}
    for device in ("cpu", "cuda"):
        model = load_model(path, torch.float32, "sdpa")
        if gated and device == "cuda":
            with_adapters(model).requires_grad_(False)
        model = model.to(device)
        model.config.attention_context = "causal"
        sampler = Sampler(model, block_size=BLOCK, mask_token_id=1, eos_token_id=EOS, slots=8, seed=5)
        for _ in range(2):  # the second time with graphs
            decoding = Decoding(SpeculativeUnmasking(draft_rounds=rounds), 0.0)
            made[device] = {t.ordinal: t.response_ids.tolist() for t in sampler.generate(requests(12), decoding)}
    assert sum(made["cuda"][i] == text for i, text in made["cpu"].items()) >= 10  # ties within rounding
