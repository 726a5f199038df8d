"""The parts of the benchmarks that start DeepSpeed or Ray, at their smallest, so that they follow what they measure."""

import pytest

from tests.benchmarks import learner_rank, publish
from tests.benchmarks.models import save_random_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_an_update_of_uneven_rows_is_measured_on_a_rank(tmp_path):
    save_random_model("tiny", "cpu", str(tmp_path))
    row = learner_rank._in_a_process(learner_rank._metrics, str(tmp_path), "cpu", 3, 8, 8, 512, True, False)
    assert row["rows"] == 3 and 0 < row["optimizer_seconds"] < row["seconds"]
    assert row["masked"] > 0 and 0 < row["mfu"] < 1


def test_publishing_is_measured_by_every_way_of_a_machine_without_gpus():
    rows = list(publish.measure("tiny", "cpu", 1))
    assert [row["way"] for row in rows] == ["slow reference", "object_store", "broadcast"]
    assert all(0 < row["pause"] <= row["seconds"] for row in rows)
