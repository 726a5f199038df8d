"""Weights between GPU memories: exact bytes by both transports, and swaps under a sampler's captured graphs.

Needs torch, transformers, pydantic, pyarrow, ray and a CUDA device (the broadcast: two).
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from actors.weights_inbox import WeightsInbox
from common.config.unmasking import StaticUnmasking
from common.student import load_model
from common.weights.broadcast import BroadcastTransport, connect, open_store
from common.weights.checksums import device_checksums
from common.weights.object_store import ObjectStoreTransport
from learner.publish import parameter_buckets
from tests.gpu.test_cuda import BLOCK, EOS, requests
from tests.models import tiny_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


def named(seed: int, device: str) -> list[tuple[str, torch.Tensor]]:
    """A tensor of three pieces, one of an odd number of bfloat16, a scalar."""
    generator = torch.Generator(device).manual_seed(seed)
    big = torch.randn(9 * 2**20 + 1, generator=generator, device=device)
    odd = torch.randn(7, 3, generator=generator, device=device).bfloat16()
    return [("big", big), ("odd", odd), ("scalar", torch.randn((), generator=generator, device=device))]


def buckets(tensors: list[tuple[str, torch.Tensor]]):
    yield tensors[:1]
    yield tensors[1:2]
    yield tensors[2:]


def test_object_store_between_gpu_memories(ray_local):
    sender, reader = ObjectStoreTransport(), ObjectStoreTransport("cuda")
    places = set()
    for version in range(4):
        tensors = named(version, "cuda")
        fetched = reader.fetch(sender.publish(version, buckets(tensors)))
        places.add(tuple(tensor.data_ptr() for _, tensor in fetched))
        for (name, expected), (fetched_name, got) in zip(tensors, fetched, strict=True):
            assert fetched_name == name and got.is_cuda
            assert torch.equal(got, expected), (version, name)
    assert len(places) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each member")
def test_broadcast_between_gpus():
    store, members = open_store("localhost"), ("learner-0", "rollout-0")
    with ThreadPoolExecutor(2) as pool:
        sends = pool.submit(BroadcastTransport, store, members, 0, torch.device("cuda", 0), 60.0)
        own = connect("localhost", store.port, 60.0)
        receives = pool.submit(BroadcastTransport, own, members, 1, torch.device("cuda", 1), 60.0)
        sender, receiver = sends.result(), receives.result()
    for version in range(3):
        tensors = named(version, "cuda:0")
        for (_, expected), (_, got) in zip(
            tensors, receiver.fetch(sender.publish(version, buckets(tensors))), strict=True
        ):
            assert got.device.index == 1
            assert torch.equal(got.cpu(), expected.cpu())


def test_device_checksum_is_that_of_the_host():
    data = torch.randint(256, (3 * 2**20 + 8,), dtype=torch.uint8)
    assert device_checksums([data.cuda(), data[:64].cuda()]) == device_checksums([data, data[:64]])


def test_weights_arrive_beside_captures_and_are_swapped_under_graphs(tmp_path, ray_local):
    def sampler(seed: int) -> Sampler:
        path = tiny_qwen3(tmp_path / str(seed), seed=seed, hidden=128, heads=4, kv_heads=2)
        model = load_model(path, torch.float32, "sdpa").cuda().requires_grad_(False)
        mask = model.config.vocab_size - 1
        return Sampler(model, block_size=BLOCK, mask_token_id=mask, eos_token_id=EOS, slots=8, seed=5, compiled=False)

    def responses(of: Sampler) -> list[list[int]]:
        done = {t.ordinal: t.response_ids.tolist() for t in of.generate(requests(), Decoding(StaticUnmasking(), 1.0))}
        return [done[ordinal] for ordinal in sorted(done)]

    old, new = sampler(1), sampler(2)
    inbox = WeightsInbox(ObjectStoreTransport("cuda"), 60.0)
    handle = ObjectStoreTransport().publish(1, parameter_buckets(new.model, 2**16))
    expected = responses(new)
    before = responses(old)
    stop = threading.Event()

    def fetch_again_and_again() -> None:
        while not stop.is_set():
            inbox.transport.fetch(handle)

    with ThreadPoolExecutor(1) as pool:
        fetches = pool.submit(fetch_again_and_again)
        for _ in range(3):  # captures its graphs meanwhile, then replays them
            assert responses(old) == before
        stop.set()
        fetches.result()
    inbox.fetch(handle)
    inbox.swap(old.model, 1)
    assert responses(old) == expected != before
