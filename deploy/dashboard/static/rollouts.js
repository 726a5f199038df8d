// The trajectory viewer: a rollout as text, its tokens coloured by the round in which each was revealed.

import { number } from "/static/format.js";

const KL_FULL = 5; // nats that get the strongest colour
const PLAY_MS = 8000; // a whole rollout

const $ = (id) => document.getElementById(id);

export class Rollouts {
  constructor() {
    this.list = [];
    this.current = null;
    this.timer = 0;
    $("step").addEventListener("input", () => this.#touched());
    $("play").addEventListener("click", () => (this.timer ? this.#pause() : this.#play()));
    $("colour").addEventListener("change", () => this.#paint());
    $("follow").addEventListener("change", () => this.#followNewest());
    const response = $("response");
    response.addEventListener("pointermove", (event) => this.#hover(event));
    response.addEventListener("pointerdown", (event) => this.#hover(event));
    response.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  }

  /** The kept rollouts have changed. */
  async refresh() {
    const answer = await fetched("/api/rollouts");
    if (!answer) return;
    this.list = answer.reverse();
    $("no-rollouts").hidden = this.list.length > 0;
    $("rollouts").replaceChildren(...this.list.map((rollout) => this.#entry(rollout)));
    if (!this.current || $("follow").checked) await this.#followNewest();
    this.#mark();
  }

  #entry(rollout) {
    const entry = document.createElement("button");
    entry.type = "button";
    entry.role = "option";
    entry.dataset.key = key(rollout);
    const title = document.createElement("strong");
    title.textContent = `batch ${rollout.batch}`;
    const facts = document.createElement("span");
    const rate = rollout.offline ? "offline" : `${number(rollout.tokens / Math.max(rollout.forwards, 1), 2)} a step`;
    facts.textContent = `${rollout.tokens} tokens, ${rate}`;
    entry.append(title, facts);
    entry.addEventListener("click", () => {
      $("follow").checked = false;
      this.#open(rollout);
    });
    return entry;
  }

  async #followNewest() {
    if ($("follow").checked && this.list.length && !this.timer) await this.#open(this.list[0]);
  }

  async #open(rollout) {
    if (this.current && key(this.current) === key(rollout)) return;
    const answer = await fetched(`/api/rollouts/${key(rollout)}`);
    if (!answer) return; // a newer one has taken its place
    this.#pause();
    this.current = answer;
    this.#layOut();
    this.#mark();
  }

  #mark() {
    for (const entry of $("rollouts").children) {
      entry.setAttribute("aria-selected", String(Boolean(this.current) && entry.dataset.key === key(this.current)));
    }
  }

  /** Steps count over the whole response: a block's rounds follow those of the blocks before it. */
  #layOut() {
    const r = this.current;
    const blocks = r.tokens.map((_, i) => Math.floor((r.prompt_tokens + i) / r.block_size));
    const rounds = new Map();
    blocks.forEach((block, i) => rounds.set(block, Math.max(rounds.get(block) ?? 0, r.rounds[i] + 1)));
    const before = new Map();
    let total = 0;
    for (const [block, count] of rounds) {
      before.set(block, total);
      total += count;
    }
    r.steps = r.rounds.map((round, i) => before.get(blocks[i]) + round);
    r.blocks = blocks.map((block) => block - blocks[0]);
    r.total = total;
    r.deepest = Math.max(...r.rounds, 0);

    $("viewer").hidden = false;
    $("rollout-facts").textContent = [
      `batch ${r.batch}`, `prompt ${r.ordinal}${r.sample ? `, sample ${r.sample}` : ""}`, r.domain,
      r.offline ? "an offline response, not the student's" : `weights version ${r.weights_version}`,
      `${r.tokens.length - r.tail + r.cut} tokens` + (r.offline ? "" : ` in ${r.forwards} steps`),
      `blocks of ${r.block_size}`, r.finish_reason === "eos" ? "ended by itself" : "cut at the length limit",
      r.cut ? `the last ${r.cut} tokens are not shown` : "",
    ].filter(Boolean).join(" · ");
    $("prompt").textContent = r.prompt;
    $("response").replaceChildren(...r.tokens.map((text, i) => {
      const token = document.createElement("span");
      token.className = "token";
      token.dataset.index = i;
      token.textContent = text === "" ? "·" : text.replaceAll("\n", "↵\n");
      token.classList.toggle("tail", i >= r.tokens.length - r.tail);
      if (i && r.blocks[i] !== r.blocks[i - 1]) token.classList.add("block-start");
      return token;
    }));
    $("step").max = r.total;
    $("step").value = r.total;
    this.#paint();
  }

  /** Colours and masks for the slider's step; cheap, since only classes and one variable change. */
  #paint() {
    const r = this.current;
    if (!r) return;
    const mode = document.querySelector("#colour input:checked").value;
    const step = Number($("step").value);
    [...$("response").children].forEach((token, i) => {
      const masked = r.steps[i] >= step;
      token.classList.toggle("masked", masked);
      token.classList.toggle("new", !masked && r.steps[i] === step - 1 && step < r.total);
      const value = { round: r.rounds[i] / Math.max(r.deepest, 1), kl: klShade(r.kl[i]), confidence: 1 - r.confidence[i] }[mode];
      token.classList.toggle("unknown", value === null);
      token.style.setProperty("--v", value ?? 0);
    });
    $("response").dataset.mode = mode;
    $("step-text").textContent = `step ${step} of ${r.total}`;
    $("scale").replaceChildren(...this.#scale(mode));
  }

  #scale(mode) {
    const r = this.current;
    const swatch = (value, text) => {
      const part = document.createElement("span");
      const box = document.createElement("i");
      box.className = "swatch token-swatch";
      box.dataset.mode = mode;
      box.style.setProperty("--v", value);
      part.append(box, text);
      return part;
    };
    if (mode === "round") {
      const shown = [...Array(r.deepest + 1).keys()].filter((k) => r.deepest < 8 || k % Math.ceil(r.deepest / 6) === 0);
      return shown.map((k) => swatch(k / Math.max(r.deepest, 1), k === 0 ? "round 1" : String(k + 1)));
    }
    if (mode === "kl") return [0.01, 0.1, 1, KL_FULL].map((kl) => swatch(klShade(kl), `${kl} nats`));
    return [1, 0.75, 0.5, 0.25].map((c) => swatch(1 - c, String(c)));
  }

  #hover(event) {
    const token = event.target.closest(".token");
    const tip = $("tip");
    tip.hidden = !token;
    if (!token) return;
    const r = this.current, i = Number(token.dataset.index);
    const masked = token.classList.contains("masked");
    const rows = [
      ["position", `${i + 1}, block ${r.blocks[i] + 1}`],
      ["revealed", r.offline ? "offline" : `round ${r.rounds[i] + 1}, step ${r.steps[i] + 1}`],
      ["confidence", r.offline ? "–" : number(r.confidence[i], 3)],
      ["KL", r.kl[i] !== null ? `${number(r.kl[i], 3)} nats` : token.classList.contains("tail")
        ? "none: behind the end token" : "not in a trained state"],
    ];
    const title = document.createElement("strong");
    title.textContent = masked ? "masked" : JSON.stringify(r.tokens[i]).slice(1, -1).replace(/^ | $/g, "␣") || "part of a character";
    const list = document.createElement("dl");
    for (const [name, value] of rows) {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      list.append(dt, dd);
    }
    tip.replaceChildren(title, list);
    const box = token.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - own.width - 8);
    const above = box.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 60 ? above : box.bottom + 8}px`;
  }

  #touched() {
    $("follow").checked = false;
    this.#pause();
    this.#paint();
  }

  #play() {
    const slider = $("step");
    $("follow").checked = false;
    if (Number(slider.value) >= this.current.total) slider.value = 0;
    $("play").textContent = "❚❚";
    this.timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      this.#paint();
      if (Number(slider.value) >= this.current.total) this.#pause();
    }, Math.max(30, Math.min(400, PLAY_MS / Math.max(this.current.total, 1))));
  }

  #pause() {
    clearInterval(this.timer);
    this.timer = 0;
    $("play").textContent = "▶";
  }
}

/** JSON, or null where the server is gone or no longer has it. */
async function fetched(url) {
  const answer = await fetch(url).catch(() => null);
  return answer?.ok ? answer.json().catch(() => null) : null;
}

function key(rollout) {
  return `${rollout.batch}/${rollout.ordinal}/${rollout.sample}`;
}

/** 0 at 1e-3 nats and below, 1 at KL_FULL, logarithmic between. */
function klShade(kl) {
  if (kl === null) return null;
  return Math.min(1, Math.max(0, Math.log(Math.max(kl, 1e-3) / 1e-3) / Math.log(KL_FULL / 1e-3)));
}
