"""Weights transport: buckets under a cap, exact bytes, checksums, and refusals by name."""

import dataclasses

import pytest
import torch
from torch import nn

from common.weights import ObjectStoreTransport, load_weights

pytestmark = pytest.mark.timeout(120)


def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "big": torch.randn(100, 10),
        "scalar": torch.tensor(2.0),
        "c": torch.arange(6).view(2, 3),
    }


def test_round_trip_in_capped_buckets(ray_local):
    transport = ObjectStoreTransport(bucket_bytes=256)
    handle = transport.publish(4, iter(tensors().items()))
    assert handle.version == 4
    assert len(handle.buckets) == 3  # a and b, big alone, scalar and c
    assert handle.nbytes == sum(t.nbytes for t in tensors().values())
    for (name, got), (expected_name, expected) in zip(transport.fetch(handle), tensors().items(), strict=True):
        assert name == expected_name
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)

    spec = dataclasses.replace(handle.tensors[2], checksum=1)
    broken = dataclasses.replace(handle, tensors=(*handle.tensors[:2], spec, *handle.tensors[3:]))
    with pytest.raises(ValueError, match="version 4: checksum of 'big'"):
        list(transport.fetch(broken))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


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
