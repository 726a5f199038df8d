"""The dashboard: what it reads from a run's folder, and what it answers over HTTP."""

import json
import math
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from common.config.dashboard import is_loopback
from common.config.errors import ConfigError
from common.config.file import load_config
from deploy.dashboard.charts import CHARTS
from deploy.dashboard.decimation import min_max, moving_average
from deploy.dashboard.line_file import LineFile
from deploy.dashboard.process import DashboardProcess, free_port, read_token
from deploy.dashboard.run_reader import RunReader, check_run_folder, duration, health
from deploy.dashboard.server import create_app
from deploy.monitoring.metrics import METRICS

ROLLOUT = {
    "batch": 3, "ordinal": 7, "sample": 0, "domain": "math", "weights_version": 3, "finish_reason": "eos",
    "offline": False, "forwards": 2, "block_size": 4, "prompt": "2+2?", "prompt_tokens": 4, "cut": 0, "tail": 1,
    "tokens": ["4", "<script>", "\n", "x"], "rounds": [0, 1, 0, 1], "confidence": [0.9, 0.5, 0.8, 0.7],
    "kl": [0.1, None, 0.2, None],
}  # fmt: skip


def row(batch: int, **changed: float | None) -> str:
    metrics = {name: batch + i / 64 for i, name in enumerate(METRICS)} | {
        "batch": batch,
        "response_tokens": 100 * batch,
    }
    return json.dumps(metrics | {"time": 1000.0 + 36 * batch} | changed) + "\n"


def status(**changed: object) -> dict:
    now = time.time()
    facts = {
        "name": "r", "state": "training", "detail": "", "heartbeat": now, "progressed": now, "started": now - 10,
        "batch": 4, "batches": 9, "batch_seconds": 2.0, "expected_end": now + 10, "actors": [],
    }  # fmt: skip
    return facts | changed


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("name: r\n")
    (tmp_path / "metrics.jsonl").write_text("".join(row(batch) for batch in range(4)))
    (tmp_path / "status.json").write_text(json.dumps(status()))
    event = {"time": time.time(), "level": "warning", "text": "KL rose"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "trajectories.jsonl").write_text(json.dumps(ROLLOUT) + "\n")
    return tmp_path


def client(run_dir, host="127.0.0.1", token=None, base="http://127.0.0.1"):
    return TestClient(create_app(run_dir, host, token), base_url=base)


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300),
    st.integers(4, 60),
)
def test_decimation_keeps_ends_extremes_and_order(values, points):
    y = np.array(values)
    x = np.arange(len(y), dtype=np.float64)
    xs, ys = min_max(x, y, points)
    assert len(xs) <= points
    assert xs[0] == 0 and xs[-1] == len(y) - 1
    assert (np.diff(xs) > 0).all()
    assert np.array_equal(ys, y[xs.astype(int)], equal_nan=True)
    if not np.isnan(y).all():
        assert np.nanmin(ys) == np.nanmin(y) and np.nanmax(ys) == np.nanmax(y)


@given(st.lists(st.floats(-100, 100) | st.just(math.nan), min_size=1, max_size=40), st.integers(1, 12))
def test_moving_average_equals_a_loop(values, width):
    expected = []
    for i in range(len(values)):
        known = [v for v in values[max(0, i - width + 1) : i + 1] if not math.isnan(v)]
        expected.append(sum(known) / len(known) if known else math.nan)
    assert np.allclose(moving_average(np.array(values), width), expected, atol=1e-9, equal_nan=True)


def test_every_chart_shows_metrics_of_the_registry():
    assert {line.metric for chart in CHARTS for line in chart.lines} <= METRICS.keys()
    assert all(
        len({METRICS[line.metric].unit for line in chart.lines}) <= 1 or chart.name == "queues" for chart in CHARTS
    )


def test_reader_follows_a_growing_file(run_dir):
    reader = RunReader(run_dir)
    reader.refresh()
    assert reader.batches == 4
    with (run_dir / "metrics.jsonl").open("a") as file:
        whole = row(4)
        file.write(whole[:50])
        file.flush()
        reader.refresh()
        assert reader.batches == 4  # a line that is being written is not read
        file.write(whole[50:] + row(5, kl=math.nan))
    reader.refresh()
    assert reader.columns["batch"] == [0, 1, 2, 3, 4, 5]
    series = reader.series("batch", ["kl"], 600)["kl"]
    assert series["x"] == [0, 1, 2, 3, 4, 5]
    assert series["y"][-1] is None  # NaN is a gap


def lines_of(numbers: range, words: str = "a") -> bytes:
    return "".join(f"{words} {number}\n" for number in numbers).encode()


def cut_in_place(path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(data)


def replace(path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("write", [cut_in_place, replace])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_file_that_was_cut_is_read_again_however_long_it_is_by_now(tmp_path, write, count):
    path = tmp_path / "lines"
    path.write_bytes(lines_of(range(4)))
    file = LineFile(path)
    assert file.read() == (True, lines_of(range(4)).splitlines(keepends=True))
    write(path, lines_of(range(2)) + lines_of(range(2, count), "other, longer"))
    assert file.read() == (True, path.read_bytes().splitlines(keepends=True))
    assert file.read() == (False, [])


def test_a_last_line_without_its_end_is_left_for_the_next_read(tmp_path):
    path = tmp_path / "lines"
    file = LineFile(path)
    assert file.read() == (False, [])
    whole = "3 ≤ 4\n".encode()
    for end in range(len(whole)):  # also in the middle of a character
        path.write_bytes(b"1\n2\n" + whole[:end])
        assert LineFile(path).read() == (True, [b"1\n", b"2\n"])
    file.read()
    with path.open("ab") as appended:
        appended.write(whole[-1:])
    assert file.read() == (False, [whole])


def test_page_starts_again_when_a_resumed_run_cut_its_files_and_went_on(run_dir):
    """The cut ends in the middle of a line that was read before: reading on would meet half of one."""
    with client(run_dir) as http:
        assert http.get("/api/run").json()["batches"] == 4
        metrics = row(0) + row(1, kl=5.123456789) + "".join(row(batch, kl=7.0) for batch in range(2, 9))
        (run_dir / "metrics.jsonl").write_text(metrics)
        event = {"time": time.time(), "level": "info", "text": "going on from batch-000002 ≤ 4"}
        (run_dir / "events.jsonl").write_text(json.dumps(event, ensure_ascii=False) + "\n" + '{"time"')
        (run_dir / "trajectories.jsonl").write_text(json.dumps(ROLLOUT | {"batch": 1}) + "\n")
        run = http.get("/api/run").json()
        assert run["batches"] == 9
        assert run["latest"]["kl"] == 7
        assert [e["text"] for e in run["events"]] == [event["text"]]
        assert [r["batch"] for r in http.get("/api/rollouts").json()] == [1]


def test_series_of_a_part_of_the_axis_reaches_its_edges(run_dir):
    reader = RunReader(run_dir)
    reader.refresh()
    assert reader.series("response_tokens", ["kl"], 600, 150, 250)["kl"]["x"] == [100, 200, 300]
    assert reader.series("hours", ["kl"], 600)["kl"]["x"] == [0, 0.01, 0.02, 0.03]
    assert reader.series("batch", ["kl~"], 600)["kl~"]["y"] == pytest.approx(
        [np.mean([n + list(METRICS).index("kl") / 64 for n in range(end + 1)]) for end in range(4)], abs=1e-4
    )


def test_ten_thousand_batches_are_answered_at_once(run_dir):
    (run_dir / "metrics.jsonl").write_text("".join(row(batch) for batch in range(10_000)))
    with client(run_dir) as http:
        assert http.get("/api/run").json()["batches"] == 10_000  # reads the file
        start = time.perf_counter()
        answer = http.get("/api/series?points=600").json()
        seconds = time.perf_counter() - start
    assert all(len(series["x"]) <= 600 for series in answer["series"].values())
    assert seconds < 2


def test_bottleneck_is_the_stage_that_takes_longest(run_dir):
    seconds = {"seconds/batch": 4.0, "seconds/rollout": 1.0, "seconds/teacher": 0.5, "seconds/learner": 3.0}
    lines = [row(n, **seconds, **{"seconds/publish": 0.1, "busy/learner": 0.75}) for n in range(12)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    reader = RunReader(run_dir)
    reader.refresh()
    shares = reader.shares()
    assert (shares["bottleneck"], shares["bottleneck_share"]) == ("learner", 0.75)
    assert shares["roles"]["learner"]["busy"] == 0.75


def test_a_role_without_processes_is_not_shown(run_dir):
    none = {f"{kind}/teacher": None for kind in ("busy", "waiting", "blocked")}
    (run_dir / "metrics.jsonl").write_text("".join(row(n, **none) for n in range(3)))
    reader = RunReader(run_dir)
    reader.refresh()
    assert list(reader.shares()["roles"]) == ["rollout", "learner"]


@pytest.mark.parametrize(
    ("changed", "warned", "level", "words"),
    [
        ({}, False, "good", "all well"),
        ({}, True, "warning", "KL rose"),
        ({"heartbeat": 100.0}, False, "bad", "no sign of life"),
        ({"still_s": 300}, False, "warning", "nothing has moved for 5 min"),
        ({"state": "evaluating", "detail": "evaluating the teacher"}, False, "busy", "evaluating the teacher"),
        ({"state": "finished", "heartbeat": 100.0}, True, "done", "finished"),
        ({"state": "failed", "detail": "teacher-0 died"}, False, "bad", "teacher-0 died"),
        ({"state": "stopped", "detail": "go on with --resume auto", "heartbeat": 1.0}, False, "warning", "--resume"),
    ],
)
def test_health_in_one_sentence(changed, warned, level, words):
    events = [{"time": time.time(), "level": "warning", "text": "KL rose"}] if warned else []
    if "still_s" in changed:
        changed = {"progressed": time.time() - changed["still_s"]}
    verdict = health(status(**changed), events, time.time())
    assert verdict["level"] == level
    assert words in verdict["text"]


def test_a_run_without_status_is_shown_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(row(0))
    with client(tmp_path) as http:
        answer = http.get("/api/run").json()
    assert answer["health"]["level"] == "unknown"
    assert answer["batches"] == 1


def test_durations():
    assert [duration(s) for s in (9, 61, 3 * 3600 + 300, 2 * 86400 + 3600)] == ["9 s", "1 min", "3 h 5 min", "2 d 1 h"]


def test_endpoints(run_dir):
    with client(run_dir) as http:
        page = http.get("/")
        assert "<title>opdlm</title>" in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere
        assert http.get("/plotly.min.js").headers["content-type"].startswith("text/javascript")
        for name in ("page.js", "charts.js", "rollouts.js", "format.js", "theme.js", "style.css", "favicon.svg"):
            assert http.get(f"/static/{name}").status_code == 200
        description = http.get("/api/page").json()
        assert description["metrics"].keys() == METRICS.keys()
        assert {"throughput", "kl", "staleness"} <= {chart["name"] for chart in description["charts"]}
        run = http.get("/api/run").json()
        assert run["run"]["name"] == "r"
        assert run["events"][0]["text"] == "KL rose"
        listed = http.get("/api/rollouts").json()
        assert listed == [{"batch": 3, "ordinal": 7, "sample": 0, "offline": False, "forwards": 2, "tokens": 3}]
        assert http.get("/api/rollouts/3/7/0").json() == ROLLOUT
        assert http.get("/api/rollouts/3/8/0").status_code == 404
        assert http.get("/api/series?x=nonsense").status_code == 422
        assert http.get("/static/../server.py").status_code == 404


def test_the_files_of_an_earlier_release_are_read_under_the_new_names(run_dir):
    old = {"stored" if name == "offline" else name: value for name, value in ROLLOUT.items()}
    (run_dir / "trajectories.jsonl").write_text(json.dumps(old) + "\n")
    rows = [json.loads(row(batch, offline_share=0.25)) for batch in range(2)]
    rows[0]["stored_share"] = rows[0].pop("offline_share")  # the run was resumed with this release after batch 0
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reader = RunReader(run_dir)
    reader.refresh()
    assert reader.columns["offline_share"] == [0.25, 0.25]
    with client(run_dir) as http:
        assert http.get("/api/rollouts").json()[0]["offline"] is False
        assert http.get("/api/rollouts/3/7/0").json() == ROLLOUT


def test_a_loopback_page_answers_to_its_own_name_only(run_dir):
    with client(run_dir, base="http://evil.example") as http:
        assert http.get("/api/run").status_code == 400
    with client(run_dir, base="http://localhost:8270") as http:
        assert http.get("/api/run").status_code == 200


def test_token(run_dir):
    token = "0123456789abcdef"
    with client(run_dir, host="0.0.0.0", token=token, base="http://node-7") as http:
        for path in ("/", "/api/run", "/api/stream", "/static/page.js", "/plotly.min.js"):
            assert http.get(path).status_code == 401
        assert http.get("/?token=wrong").status_code == 401
        assert http.get("/api/run", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert http.get("/api/run").status_code == 401
        answer = http.get(f"/?token={token}", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=strict" in answer.headers["set-cookie"]
        assert http.get("/").status_code == 200  # the cookie


@pytest.mark.parametrize("host", ["0.0.0.0", "fd00::1", "192.0.2.7", "node-7"])
def test_another_address_needs_a_token(host):
    with pytest.raises(ConfigError, match=r"dashboard: host .* token_file"):
        load_config("tiny", ["--dashboard.host", host])
    assert load_config("tiny", ["--dashboard.host", host, "--dashboard.token_file", "t"]).dashboard.host == host


def test_loopback_addresses():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.9.1", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example"]))


def test_token_file(tmp_path):
    assert read_token(None) is None
    with pytest.raises(ConfigError, match="does not exist"):
        read_token(str(tmp_path / "none"))
    file = tmp_path / "token"
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="holds 5 characters"):
        read_token(str(file))
    file.write_text("0123456789abcdef\n")
    assert read_token(str(file)) == "0123456789abcdef"


def test_a_taken_port_is_named():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(ConfigError, match=r"dashboard.port: cannot bind 127.0.0.1:\d+ .*choose another port"):
            free_port("127.0.0.1", s.getsockname()[1])


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        check_run_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"neither config\.yaml nor metrics\.jsonl"):
        check_run_folder(tmp_path)


def first_event(url: str) -> dict:
    with httpx.stream("GET", f"{url}/api/stream", timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        data = next(line for line in answer.iter_lines() if line.startswith("data:"))
    return json.loads(data.removeprefix("data:"))


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


def test_the_process_serves_a_stream_and_ends_with_the_run(run_dir):
    config = load_config("tiny", ["--dashboard.enabled", "true", "--dashboard.port", "0"]).dashboard
    with DashboardProcess(run_dir, config) as page:
        wait_for(page.url)
        page._process.terminate()  # as `ray job stop` does to every process of a job
        assert first_event(page.url)["run"]["name"] == "r"
    with pytest.raises(httpx.TransportError):
        httpx.get(page.url, timeout=5)


def test_the_process_ends_when_its_parent_was_killed(run_dir, tmp_path):
    port = free_port("127.0.0.1", 0)
    code = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-m', 'deploy.dashboard', {str(run_dir)!r}, '--port', '{port}', "
        "'--with-parent'], start_new_session=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    url = f"http://127.0.0.1:{port}"
    wait_for(url)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            return
        time.sleep(0.2)
    raise AssertionError("the server outlived its run")


def test_no_process_where_it_is_not_enabled(run_dir):
    with DashboardProcess(run_dir, load_config("tiny", []).dashboard) as page:
        assert page.url == ""
