"""The page of a live run in a real browser: it fills, moves, and asks nothing of any other machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from deploy.dashboard.process import free_port
from tests.browser import chromium, needs_chromium

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    needs_chromium,
]

BATCHES = 500  # more than the visit needs: it ends with SIGTERM
START_MS = 240_000  # models load meanwhile
# one update per batch and all its rows kept, so that the mean over the kept tokens is the metric
ONE_UPDATE = [
    "--rollout.prompts_per_batch", "8", "--learner.batch_rows", "8", "--learner.ranks", "1",
    "--dashboard.rollouts", "8", "--learner.max_tokens_per_microbatch", "512",
]  # fmt: skip


class Visit:
    """A page that notes every request, console message and script error."""

    def __init__(self, page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def points(self, chart: str) -> int:
        return self.page.evaluate(f"document.querySelector('[data-chart={chart}] .plot').data[0].x.length")

    def ranges(self) -> list[list[float]]:
        """What the x axis of each drawn chart covers."""
        plots = "[...document.querySelectorAll('.plot')].filter((p) => p.layout)"
        return self.page.evaluate(f"{plots}.map((p) => p.layout.xaxis.range)")

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def check(self) -> None:
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith(f"{self.url}/")] == []


@pytest.fixture
def browser():
    with chromium() as started:
        yield started


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "deploy", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})


def open_when_served(page, url: str) -> None:
    for _ in range(1200):
        try:
            page.goto(url)
        except playwright.Error:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


def test_page_of_a_live_run(tmp_path, browser):
    expect = playwright.expect
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    run = start(
        "train", "tiny", "--output_dir", str(tmp_path), "--pipeline.max_batches", str(BATCHES), *ONE_UPDATE,
        "--evaluation.problems", "null", "--teacher.backend", "transformers",
        "--dashboard.enabled", "true", "--dashboard.port", str(port),
    )  # fmt: skip
    try:
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
        open_when_served(page, url)
        visit = Visit(page, url)
        page.reload()

        # it fills
        expect(page.locator("#state")).to_have_text("training", timeout=START_MS)
        expect(page.locator('[data-chart="kl"] .main-svg').first).to_be_visible(timeout=60_000)
        expect(page.locator("#bottleneck")).to_contain_text("Bottleneck")
        expect(page.locator("#actors tr")).to_have_count(4)
        expect(page.locator("#link")).to_have_text("live")
        expect(page.locator("#end")).to_contain_text("ends", timeout=30_000)
        expect(page.locator("#response .token").first).to_be_attached(timeout=30_000)

        # it moves
        points, batch = visit.points("kl"), visit.text("#batches")
        expect(page.locator("#batches")).not_to_have_text(batch, timeout=30_000)
        page.wait_for_timeout(4000)
        assert visit.points("kl") > points

        # the viewer: everything masked at step 0, more revealed with every step, all at the end
        page.locator("#follow").uncheck()
        slider, tokens = page.locator("#step"), visit.count("#response .token")
        slider.scroll_into_view_if_needed()
        slider.focus()
        slider.press("Home")
        assert visit.count("#response .token.masked") == tokens
        slider.press("ArrowRight")
        after_one = visit.count("#response .token.masked")
        assert 0 < after_one < tokens
        assert visit.count("#response .token.new") == tokens - after_one
        slider.press("End")
        assert visit.count("#response .token.masked") == 0
        page.locator("#response .token").first.hover()
        expect(page.locator("#tip")).to_contain_text("KL")
        page.get_by_text("confidence", exact=True).first.click()
        expect(page.locator("#response")).to_have_attribute("data-mode", "confidence")
        page.locator("#play").click()
        expect(page.locator("#play")).to_have_text("❚❚")

        # another axis, the other theme
        page.get_by_text("batches", exact=True).click()
        page.evaluate("window.scrollTo(0, 0)")
        expect(page.locator('[data-chart="kl"] .xtitle')).to_have_text("rollout batch")
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"

        visit.check()
        run.terminate()
        assert run.wait(timeout=120) == 128 + signal.SIGTERM
        expect(page.locator("#state")).to_have_text("stopped")
        expect(page.locator("#sentence")).to_contain_text("--resume auto")
        expect(page.locator("#link")).to_contain_text("its server has ended", timeout=30_000)
    finally:
        run.kill()
        run.wait()

    # what the viewer shows is what was trained: the tokens' mean divergence is the batch's metric
    folder = tmp_path / "tiny"
    kl = {m["batch"]: m["kl"] for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    rollouts = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    newest = [r for r in rollouts if r["batch"] == rollouts[-1]["batch"]]
    assert len(newest) == 8
    values = [value for r in newest for value in r["kl"] if value is not None]
    assert sum(values) / len(values) == pytest.approx(kl[newest[0]["batch"]], rel=1e-3)

    shares = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for role in ("rollout", "teacher", "learner"):
        assert all(abs(sum(m[f"{kind}/{role}"] for kind in ("busy", "waiting", "blocked")) - 1) < 1e-6 for m in shares)


def test_finished_run_on_a_phone_that_loses_its_connection(tmp_path, browser):
    """`opdlm dashboard` of a copied run; the page says that the server is gone, and comes back by itself."""
    from tests.unit.test_dashboard import ROLLOUT, row, status

    expect = playwright.expect
    (tmp_path / "config.yaml").write_text("name: r\n")
    (tmp_path / "metrics.jsonl").write_text("".join(row(batch) for batch in range(10_000)))
    (tmp_path / "status.json").write_text(json.dumps(status(heartbeat=time.time() - 3600)))
    (tmp_path / "trajectories.jsonl").write_text(json.dumps(ROLLOUT) + "\n")
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    server = start("dashboard", str(tmp_path), "--port", str(port))
    try:
        context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
        page = context.new_page()
        open_when_served(page, url)
        visit = Visit(page, url)
        page.reload()
        expect(page.locator('[data-chart="throughput"] .main-svg').first).to_be_visible(timeout=60_000)
        expect(page.locator("#link")).to_contain_text("data is 1 h")  # a run that died an hour ago
        expect(page.locator("#sentence")).to_contain_text("no sign of life")
        assert visit.points("throughput") <= 600
        page.locator('[data-chart="kl"]').scroll_into_view_if_needed()
        expect(page.locator('[data-chart="kl"] .main-svg').first).to_be_visible()
        assert len(visit.ranges()) >= 2 and all(r == [0, 999_900] for r in visit.ranges())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        # the text of a rollout is text
        expect(page.locator("#response")).to_contain_text("<script>")
        visit.check()

        server.terminate()
        server.wait()
        expect(page.locator("#link")).to_contain_text("connection lost", timeout=30_000)
        server = start("dashboard", str(tmp_path), "--port", str(port))
        expect(page.locator("#link")).to_contain_text("data is 1 h", timeout=60_000)
    finally:
        server.kill()
        server.wait()
