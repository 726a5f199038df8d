"""Counter-based random numbers: uniform, independent of batching, distinct by key, position and round."""

import torch

from common.seeds import state_rng, stream_key, uniform


def test_uniform_moments_and_range():
    u = uniform(torch.arange(1000)[:, None] * 7919, torch.arange(100)[None], torch.tensor(3))
    assert u.dtype == torch.float32
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3
    assert abs(u.var() - 1 / 12) < 2e-3
    bins = torch.histc(u, 20, 0, 1)
    assert (bins / bins.sum() - 0.05).abs().max() < 3e-3


def test_neighbours_are_uncorrelated():
    key = torch.full((10_000,), stream_key(0, 1, 2))
    position = torch.arange(10_000)
    u = [
        uniform(key, position, torch.tensor(0)),
        uniform(key, position + 1, torch.tensor(0)),
        uniform(key, position, torch.tensor(1)),
        uniform(key + 1, position, torch.tensor(0)),
    ]
    correlation = torch.corrcoef(torch.stack(u)) - torch.eye(4)
    assert correlation[0, 2].abs() < 0.05 and correlation[0, 3].abs() < 0.05
    assert torch.corrcoef(torch.stack([u[0][:-1], u[0][1:]]))[0, 1].abs() < 0.05


def test_one_by_one_equals_batched():
    keys = torch.tensor([stream_key(0, o, 0) for o in range(5)])
    batched = uniform(keys[:, None], torch.arange(7)[None], torch.tensor(2))
    for i in range(5):
        for j in range(7):
            assert uniform(keys[i], torch.tensor(j), torch.tensor(2)) == batched[i, j]


def test_keys_differ():
    keys = {stream_key(seed, o, s) for seed in range(3) for o in range(50) for s in range(4)}
    assert len(keys) == 600
    assert state_rng(0, 1, 0).random() != state_rng(0, 2, 0).random()
