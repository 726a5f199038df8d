// The page: one stream of snapshots; charts and rollouts are fetched when a snapshot says that they have changed.

import { Charts } from "/static/charts.js";
import { bytes, clock, duration, number, percent } from "/static/format.js";
import { Rollouts } from "/static/rollouts.js";

const CHART_MS = 1500; // charts are fetched no more often
const SILENT_MS = 6000; // the stream sends a snapshot every second
const POINTS = 600;
const FINAL = ["finished", "stopped", "failed"];
const ROLES = ["rollout", "teacher", "learner"];

const $ = (id) => document.getElementById(id);
const page = await (await fetch("/api/page")).json();
const charts = new Charts(page.charts, () => loadCharts());
const rollouts = new Rollouts();
let snapshot = null;
let lastMessage = performance.now();
let stream = null;
let shownBatches = -1, shownRollouts = -1, lastCharts = 0, loading = false, again = false;

function connect() {
  stream?.close();
  stream = new EventSource("/api/stream");
  stream.addEventListener("run", (event) => {
    lastMessage = performance.now();
    snapshot = JSON.parse(event.data);
    show();
  });
}

async function loadCharts() {
  again = loading;
  if (loading) return;
  loading = true;
  const query = new URLSearchParams({ x: charts.x, points: POINTS });
  if (charts.range) {
    query.set("begin", charts.range[0]);
    query.set("end", charts.range[1]);
  }
  try {
    const answer = await (await fetch(`/api/series?${query}`)).json();
    shownBatches = answer.batches;
    charts.show(answer.series);
  } catch {
    shownBatches = -1; // the server went away: tried again with the next snapshot
  } finally {
    loading = false;
    lastCharts = performance.now();
  }
  if (again) loadCharts();
}

function show() {
  const { run, health, latest } = snapshot;
  const done = run.batch ?? snapshot.batches, total = run.batches ?? 0;
  $("name").textContent = run.name ?? page.name;
  $("dot").className = `dot ${health.level}`;
  $("state").textContent = run.state ?? "unknown";
  $("sentence").textContent = health.text;
  $("bar").style.width = `${total ? (100 * done) / total : 0}%`;
  $("bar").parentElement.setAttribute("aria-valuenow", total ? Math.round((100 * done) / total) : 0);
  $("batches").textContent = total ? `batch ${done} of ${total}` + (run.batch_seconds ? `, ${number(run.batch_seconds, 3)} s each` : "") : "";
  document.title = `${total ? Math.round((100 * done) / total) + " % " : ""}${run.name ?? page.name} – opdlm`;
  showEnd(run);
  showTiles(latest);
  showShares(snapshot.shares, latest);
  showActors(run.actors ?? []);
  showEvents(snapshot.events);
  if (snapshot.batches !== shownBatches && !document.hidden && performance.now() - lastCharts > CHART_MS) loadCharts();
  if (snapshot.rollouts_version !== shownRollouts) {
    shownRollouts = snapshot.rollouts_version;
    rollouts.refresh();
  }
  showLink();
}

function showEnd(run) {
  const final = FINAL.includes(run.state);
  if (final) {
    $("end").textContent = `${run.state} ${clock(run.heartbeat)}`;
    $("left").textContent = `after ${duration(run.heartbeat - run.started)}`;
  } else if (run.expected_end) {
    const left = run.expected_end - snapshot.now;
    $("end").textContent = left > 0 ? `ends ${clock(run.expected_end)}` : "about to end";
    $("left").textContent = left > 0 ? `in ${duration(left)}` : "";
  } else {
    $("end").textContent = run.state ? "end not known yet" : "";
    $("left").textContent = run.started ? `running for ${duration(snapshot.now - run.started)}` : "";
  }
}

function showTiles(latest) {
  const tiles = [
    ["KL to the teacher", number(latest.kl), "nats/token"],
    ["tokens per step", number(latest.tokens_per_step), ""],
    ["response tokens", number(latest.response_tokens), "so far"],
    ["mean length", number(latest.response_length), `of ${number(latest.response_limit)}`],
    ["weights version", number(latest.weights_version, 9), `staleness ${number(latest.staleness)}`],
    ["publishing", `${number(latest["seconds/publish"], 2)} s`, bytes(latest["bytes/weights"])],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value, unit]) => {
    const tile = element("div", "card tile");
    const cell = element("dd", "", value);
    cell.append(element("span", "unit", unit));
    tile.append(element("dt", "", name), cell);
    return tile;
  }));
}

function showShares(shares, latest) {
  if (!shares.roles) {
    $("bottleneck").textContent = "known after the first batch";
    return;
  }
  const who = element("strong", `role ${shares.bottleneck}`, shares.bottleneck);
  $("bottleneck").replaceChildren("Bottleneck: ", who, `, ${percent(shares.bottleneck_share)} of the wall time`);
  $("roles").replaceChildren(...ROLES.filter((role) => shares.roles[role]).map((role) => {
    const share = shares.roles[role];
    const row = element("div", `share ${role}`);
    const head = element("div", "share-head");
    head.append(element("span", `role ${role}`, role), element("span", "muted", `${number(latest[`${role}/tokens_per_second`])} tokens/s`));
    const bar = element("div", "stack");
    for (const kind of ["busy", "waiting", "blocked"]) {
      const part = element("div", kind);
      part.style.width = percentWidth(share[kind]);
      part.title = `${kind} ${percent(share[kind])}`;
      bar.append(part);
    }
    const text = ["busy", "waiting", "blocked"].map((kind) => `${percent(share[kind])} ${kind}`).join(" · ");
    row.append(head, bar, element("p", "small muted", text));
    return row;
  }));
}

function percentWidth(share) {
  return `${100 * (share ?? 0)}%`;
}

function showActors(actors) {
  const live = snapshot.run.state && !FINAL.includes(snapshot.run.state);
  $("actors").replaceChildren(...actors.map((actor) => {
    const row = document.createElement("tr");
    const name = element("span", `role ${actor.role}`, actor.name);
    if (actor.serves) name.append(element("span", "muted", ` (${actor.serves})`));
    const heard = live ? `${duration(snapshot.now - actor.last_heard)} ago` : clock(actor.last_heard);
    const cells = [
      ["actor", name], ["node", actor.node],
      ["state", element("span", `state ${actor.state === "waiting" ? "" : "works"}`, live ? actor.state : "ended")],
      ["weights", actor.weights_version === null ? "frozen" : `v${actor.weights_version}`, "number"],
      ["rate", actor.rate === null ? "–" : `${number(actor.rate)} tokens/s`, "number"],
      ["last contact", heard, "number"], ["restarts", String(actor.restarts), "number"],
    ];
    for (const [label, content, kind] of cells) {
      const cell = element("td", kind ?? "");
      cell.dataset.label = label;
      cell.append(content);
      row.append(cell);
    }
    return row;
  }));
}

function showEvents(events) {
  const newest = [...events].reverse();
  const warnings = newest.filter((event) => event.level !== "info").slice(0, 8);
  const line = (event) => {
    const item = element("li", event.level);
    item.append(element("time", "muted", clock(event.time)), element("span", "", event.text));
    return item;
  };
  $("warnings").replaceChildren(...(warnings.length ? warnings.map(line) : [element("li", "none muted", "none so far")]));
  $("events").replaceChildren(...newest.map(line));
}

/** Whether what is on the page is the present. */
function showLink() {
  const silent = performance.now() - lastMessage;
  const final = snapshot && FINAL.includes(snapshot.run.state);
  const age = snapshot && !final && snapshot.run.heartbeat ? snapshot.now - snapshot.run.heartbeat : 0;
  let text = "live", level = "good";
  if (silent > SILENT_MS && final) [text, level] = [`${snapshot.run.state}; its server has ended`, "done"];
  else if (silent > SILENT_MS) [text, level] = [`connection lost ${duration(silent / 1000)} ago, trying again`, "bad"];
  else if (!snapshot) [text, level] = ["connecting", "busy"];
  else if (final) [text, level] = [snapshot.run.state, "done"];
  else if (age > 15) [text, level] = [`data is ${duration(age)} old`, "bad"];
  $("link").textContent = text;
  $("link").className = `badge ${level}`;
  document.body.classList.toggle("stale", level === "bad");
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("opdlm-theme", theme);
  charts.redraw();
});
$("x-axis").addEventListener("change", (event) => {
  charts.axis(event.target.value);
  loadCharts();
});
setInterval(() => {
  showLink();
  // EventSource connects again by itself, except after an answer that is no stream, as a proxy may give
  if (stream.readyState === EventSource.CLOSED || performance.now() - lastMessage > 4 * SILENT_MS) {
    lastMessage = Math.max(lastMessage, performance.now() - 3 * SILENT_MS);
    connect();
  }
}, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden && snapshot) show(); });
connect();
