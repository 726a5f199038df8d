"""Weights transports: exact bytes against a plain copy, checksums, deadlines that name who is late, swaps in place."""

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actors.weights_inbox import WeightsInbox
from common.weights import checksums
from common.weights.broadcast import BroadcastTransport, connect, open_store, stay_on
from common.weights.object_store import ObjectStoreTransport
from common.weights.staged_buckets import StagedBuckets, as_tensor
from common.weights.transport import WeightsHandle, WeightsTransport, load_weights
from learner.publish import parameter_buckets

pytestmark = pytest.mark.timeout(120)
MEMBERS = ("learner-0", "rollout-0", "rollout-1")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "big": torch.randn(100, 10),
        "scalar": torch.randn(()),
        "transposed": torch.randn(2, 3).T,
        "integers": torch.randint(9, (2, 3)),
        "empty": torch.empty(0, 4),
    }


def buckets(named: dict[str, torch.Tensor]):
    """As the learner hands them over: a bucket's memory is gone when the next is asked for."""
    names = list(named)
    for part in (names[:2], names[2:3], names[3:]):
        copies = [(name, named[name].clone(memory_format=torch.preserve_format)) for name in part]
        yield copies
        for _, copy in copies:
            copy.zero_()


def assert_same(fetched: list[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name, _ in fetched] == list(expected)
    for name, got in fetched:
        assert got.dtype == expected[name].dtype and got.shape == expected[name].shape, name
        assert torch.equal(got, expected[name]), name


def with_checksum(handle: WeightsHandle, checksum: int) -> WeightsHandle:
    """The handle with another checksum of `big`."""
    (big,) = handle.buckets[1].tensors
    other = dataclasses.replace(handle.buckets[1], tensors=(dataclasses.replace(big, checksum=checksum),))
    return dataclasses.replace(handle, buckets=(handle.buckets[0], other, handle.buckets[2]))


def test_object_store_round_trip(ray_local, monkeypatch):
    monkeypatch.setattr(checksums, "PIECE_BYTES", 64)  # so that `big` has many pieces
    transport = ObjectStoreTransport()
    for version, seed in ((4, 0), (5, 1)):
        handle = transport.publish(version, buckets(tensors(seed)))
        assert handle.version == version
        assert [len(bucket.tensors) for bucket in handle.buckets] == [2, 1, 4]
        assert handle.nbytes == sum(t.nbytes for t in tensors().values())
        assert_same(transport.fetch(handle), tensors(seed))
    with pytest.raises(ValueError, match="version 5: checksum of 'big'"):
        transport.fetch(with_checksum(handle, 1))


@pytest.fixture
def group():
    """A sender and two receivers over gloo, in threads of this process."""
    store = open_store("localhost")
    with ThreadPoolExecutor(3) as pool:
        joined = [pool.submit(BroadcastTransport, store, MEMBERS, 0, "cpu", 20.0)]
        for rank in (1, 2):
            own = connect("localhost", store.port, 20.0)
            joined.append(pool.submit(BroadcastTransport, own, MEMBERS, rank, "cpu", 20.0))
        yield [join.result() for join in joined]


def test_broadcast_round_trip(group):
    sender, *receivers = group
    with ThreadPoolExecutor(2) as pool:
        for version, seed in ((1, 0), (2, 1)):
            handle = sender.publish(version, buckets(tensors(seed)))  # returns though nobody receives yet
            for fetch in [pool.submit(receiver.fetch, handle) for receiver in receivers]:
                assert_same(fetch.result(), tensors(seed))
        handle = with_checksum(sender.publish(3, buckets(tensors())), 1)
        for fetch in [pool.submit(receiver.fetch, handle) for receiver in receivers]:
            with pytest.raises(ValueError, match="version 3: checksum of 'big'"):
                fetch.result()


def test_the_store_does_not_grow_with_the_versions(group):
    sender, *receivers = group
    sizes = []
    with ThreadPoolExecutor(2) as pool:
        for version in range(4, 9):
            handle = sender.publish(version, buckets(tensors()))
            for fetch in [pool.submit(receiver.fetch, handle) for receiver in receivers]:
                fetch.result()
            sender._sent.result()
            sizes.append(sender._store.num_keys())
    assert sizes == sizes[:1] * 5


def test_a_receiver_that_does_not_come_is_named_on_both_sides(group):
    sender, receiver, absent = group
    for member in (sender, receiver):
        member.timeout_s = 0.3
    with pytest.raises(TimeoutError, match=r"could not receive weights version 1 .* waiting for rollout-1$"):
        receiver.fetch(WeightsHandle(1, ()))
    handle = sender.publish(1, buckets(tensors()))
    with pytest.raises(TimeoutError, match=r"waiting for rollout-1$"):
        sender.publish(2, buckets(tensors()))
    absent.timeout_s = 0.3
    with pytest.raises(TimeoutError, match=r"waiting for learner-0$"):  # it comes too late
        absent.fetch(handle)


def test_gloo_stays_on_the_interface_of_the_address_that_others_know(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    addresses = psutil.net_if_addrs()
    loopback = next(name for name, own in addresses.items() if any(a.address == "127.0.0.1" for a in own))
    other = addresses[loopback][0]._replace(address="10.1.2.3")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {**addresses, "eth7": [other]})
    stay_on("10.1.2.3")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7" and "NCCL_SOCKET_IFNAME" not in os.environ
    stay_on("127.0.0.1")  # what is chosen stays
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7" and os.environ["NCCL_SOCKET_IFNAME"] == loopback
    del os.environ["GLOO_SOCKET_IFNAME"]
    stay_on("198.51.100.9")  # no interface here has it
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_member_that_does_not_join_is_named():
    with pytest.raises(TimeoutError, match=r"join the weights group .* waiting for rollout-0, rollout-1"):
        BroadcastTransport(open_store("localhost"), MEMBERS, 0, "cpu", 0.3)


@given(st.binary(max_size=300), st.integers(1, 100))
def test_host_checksum_is_the_hash_of_the_pieces_hashes(data, size):
    array = np.frombuffer(data, np.uint8)
    slow = b"".join(xxhash.xxh3_64_digest(data[i : i + size]) for i in range(0, max(len(data), 1), size))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(checksums, "PIECE_BYTES", size)
        assert checksums.host_checksums([array, array[:1]], pool)[0] == xxhash.xxh3_64_intdigest(slow)


@given(st.integers(1, 5000), st.integers(0, 2**31), st.data())
def test_device_checksum_sees_changed_and_moved_words(words, seed, data):
    good = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, 8 * words, np.uint8))
    before, other = checksums.device_checksums([good, good[:8]])
    assert before == slow_word_checksum(good.view(torch.int64).tolist())
    assert other == slow_word_checksum(good[:8].view(torch.int64).tolist())
    bad = good.clone()
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksums.device_checksums([bad]) != [before]
    i, j = data.draw(st.integers(0, words - 1)), data.draw(st.integers(0, words - 1))
    moved = good.view(torch.int64).clone()
    moved[i], moved[j] = moved[j].item(), moved[i].item()
    same = torch.equal(moved, good.view(torch.int64))
    assert (checksums.device_checksums([moved.view(torch.uint8)]) == [before]) == same


def slow_word_checksum(words: list[int]) -> int:
    """Sums of columns, sums of rows of 1,024 words, and the rest as it is; wrapping around at 64 bits."""
    whole = len(words) // 1024 * 1024
    rows = [words[i : i + 1024] for i in range(0, whole, 1024)]
    sums = [sum(row[c] for row in rows) for c in range(1024)] + [sum(row) for row in rows] + words[whole:]
    return xxhash.xxh3_64_intdigest(np.array([s % 2**64 for s in sums], np.uint64).data)


def test_staged_buffers_stay_where_they_are():
    staged = StagedBuckets(torch.device("cpu"))
    named = [tensors()[name] for name in ("a", "b", "scalar")]
    parts = staged.parts(0, named)
    assert [len(part) for part in parts] == [64, 64, 64]
    for tensor, part in zip(named, parts, strict=True):
        as_tensor(part, tensor).copy_(tensor)
    again = staged.parts(0, named)
    assert [p.data_ptr() for p in again] == [p.data_ptr() for p in parts]
    assert all(torch.equal(as_tensor(p, t), t) for p, t in zip(again, named, strict=True))
    assert len(staged.parts(0, [torch.zeros(1000)])[0]) == 4032  # grown


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_parameter_buckets_hold_every_parameter_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 100, bias=False), Tied())
    found = list(parameter_buckets(model, 128))
    assert [[name for name, _ in bucket] for bucket in found] == [
        ["0.weight", "0.bias"],
        ["1.weight"],
        ["2.embed.weight"],
    ]
    assert all(parameter is dict(model.named_parameters())[name] for bucket in found for name, parameter in bucket)


def test_load_in_place_and_refusals():
    model = Tied()
    storage = model.embed.weight.data_ptr()
    load_weights(model, [("embed.weight", torch.ones(4, 3, dtype=torch.bfloat16))])
    assert model.head.weight.data_ptr() == storage
    assert (model.head.weight == 1).all()
    with pytest.raises(ValueError, match=r"lack.*embed\.weight"):
        load_weights(model, [])
    with pytest.raises(ValueError, match="'other'"):
        load_weights(model, [("other", torch.ones(1))])
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(4, 3\)"):
        load_weights(model, [("embed.weight", torch.ones(2, 2))])


class Slow(WeightsTransport):
    """Fetches `value` everywhere when it is let go; a value that is an error is raised. A fetch takes 3 `seconds`."""

    def __init__(self, value: float | Exception) -> None:
        self.value = value
        self.seconds = 0.0
        self.entered, self.go = threading.Event(), threading.Event()

    def publish(self, version, buckets):
        raise NotImplementedError

    def fetch(self, handle):
        self.entered.set()
        assert self.go.wait(10)
        self.seconds += 3.0
        if isinstance(self.value, Exception):
            raise self.value
        return [("embed.weight", torch.full((4, 3), self.value))]


def test_inbox_fetches_beside_the_sampler_and_swaps_on_demand():
    model = Tied()
    storage = model.embed.weight.data_ptr()
    transport = Slow(2.0)
    swap_began = threading.Event()

    def stopwatch() -> float:
        swap_began.set()
        return transport.seconds

    inbox = WeightsInbox(transport, timeout_s=10, stopwatch=stopwatch)
    before = model.embed.weight.clone()
    with ThreadPoolExecutor(2) as pool:
        fetch = pool.submit(inbox.fetch, WeightsHandle(1, ()))
        assert transport.entered.wait(10)
        assert torch.equal(model.embed.weight, before)
        transport.go.set()
        fetch.result()
        assert torch.equal(model.embed.weight, before)  # the sampler's until it asks
        assert inbox.pause_seconds == 0
        inbox.swap(model, 1)
        assert (model.embed.weight == 2).all() and model.embed.weight.data_ptr() == storage
        assert inbox.pause_seconds == 0  # it was there before it was asked for

        transport.go.clear()
        swap_began.clear()
        pool.submit(inbox.fetch, WeightsHandle(2, ()))
        pool.submit(lambda: swap_began.wait(10) and transport.go.set())
        inbox.swap(model, 2)  # waits
        assert inbox.pause_seconds == 3.0


def test_inbox_passes_errors_on_and_waits_with_a_deadline():
    inbox = WeightsInbox(Slow(ValueError("broken")), timeout_s=0.2)
    with pytest.raises(TimeoutError, match="weights version 3 was not fetched within 0 s"):
        inbox.swap(Tied(), 3)
    inbox.transport.go.set()
    with pytest.raises(ValueError, match="broken"):
        inbox.fetch(WeightsHandle(3, ()))
    with pytest.raises(ValueError, match="broken"):
        inbox.swap(Tied(), 3)
    inbox.transport.value = 1.0
    inbox.fetch(WeightsHandle(4, ()))
    with pytest.raises(ValueError, match="weights version 4 was fetched, expected 5"):
        inbox.swap(Tied(), 5)
