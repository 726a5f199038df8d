"""Shards of learner ranks: what is read back is what was written, and everything else is refused by its name."""

import os

import pytest
import torch

from learner.shards import HostCopy, check_shard, read_shard, shard_file, write_shard


def tensors() -> dict[str, torch.Tensor]:
    names = ("0.weights", "0.exp_avg", "0.exp_avg_sq")
    return {name: torch.arange(6.0) + i for i, name in enumerate(names)} | {"0.step": torch.tensor(3.0)}


def test_a_shard_is_read_as_it_was_written(tmp_path):
    write_shard(tmp_path / "resume", 1, 2, tensors())
    again = read_shard(tmp_path / "resume", 1, 2)
    check_shard(weights(), again)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors().items())


def weights() -> dict[str, torch.Tensor]:
    return {"0.weights": torch.zeros(6)}


def test_a_shard_from_before_the_first_update_has_no_states():
    check_shard(weights(), {"0.weights": torch.arange(6.0)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.exp_avg": torch.arange(5.0)}, r"tensor '0.exp_avg' is torch.float32 \[5\], expected torch.float32 \[6\]"),
        ({"0.exp_avg": torch.arange(6)}, r"tensor '0.exp_avg' is torch.int64 \[6\]"),
        ({"0.weights": torch.full((6,), torch.nan)}, "tensor '0.weights' holds values that are not finite"),
        ({"1.weights": torch.arange(6.0)}, "tensor '1.weights' is not known"),
        ({"0.exp_avg_sq": None}, "tensor '0.exp_avg_sq' is missing"),
        (
            {"0.step": torch.tensor([3.0])},
            r"tensor '0.step' is torch.float32 \[1\], expected torch.float32 or torch.int64 \[\]",
        ),
    ],
)
def test_another_shard_is_refused_by_the_name_of_the_tensor(change, said):
    other = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=said):
        check_shard(weights(), other)


def test_a_file_that_is_missing_damaged_or_of_other_ranks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rank-00000.safetensors' is missing: .*learner\.ranks"):
        read_shard(tmp_path, 0, 1)
    write_shard(tmp_path, 0, 2, tensors())
    with pytest.raises(ValueError, match=r"was written by 2 ranks; go on with learner\.ranks 2"):
        read_shard(tmp_path, 0, 1)
    os.truncate(shard_file(tmp_path, 0), 40)
    with pytest.raises(ValueError, match=r"rank-00000.safetensors' is damaged"):
        read_shard(tmp_path, 0, 2)


def test_a_copy_stays_as_it_was_taken_and_its_memory_is_used_again():
    copy, own = HostCopy(), tensors()
    taken = copy.take(own)
    own["0.weights"] += 1
    assert torch.equal(taken["0.weights"], tensors()["0.weights"])
    again = copy.take(own)
    assert torch.equal(again["0.weights"], own["0.weights"])
    assert again["0.weights"].data_ptr() == taken["0.weights"].data_ptr()
