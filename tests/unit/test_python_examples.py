"""docs/python.md: the sampler on its own."""

from tests.python_examples import run_blocks


def test_the_sampler_on_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(tmp_path, integration=False)
    trajectories, first = names["trajectories"], names["first"]
    assert [t.ordinal for t in trajectories] == [0, 1]
    for trajectory in trajectories:
        assert 0 < len(trajectory.response_ids) <= 64
        assert (trajectory.confidence <= 1).all()
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"{question} -> ") for line in printed for question in names["questions"]) == 2
    assert first.finish_reason in printed
    assert float(printed[-1]) == len(first.response_ids) / first.denoise_forwards
    assert names["tokenizer"].mask_token_id not in first.x0
