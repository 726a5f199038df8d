// The chat: asks the API on this machine, and shows every round of every block as it comes.

const $ = (id) => document.getElementById(id);
const LAST_COLOUR = 5;
const chat = $("chat");
const welcome = $("welcome");
let model = null;
let messages = [];
let running = null; // an AbortController while an answer is written

$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("opdlm-theme", dark ? "light" : "dark");
});
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  chat.replaceChildren(welcome);
  $("question").focus();
});

function headers() {
  const key = sessionStorage.getItem("opdlm-key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}
$("key").addEventListener("change", () => {
  sessionStorage.setItem("opdlm-key", $("key").value);
  load();
});

const blockSize = () => 2 ** Number($("block").value);
const WITH_THRESHOLD = ["dynamic", "adaptive"];
function showSettings() {
  $("threshold-value").textContent = Number($("threshold").value).toFixed(3).replace(/0$/, "");
  $("threshold").disabled = !WITH_THRESHOLD.includes($("rule").value);
  $("block-value").textContent = blockSize();
  $("temperature-value").textContent = Number($("temperature").value).toFixed(1);
}
$("settings").addEventListener("input", showSettings);

async function load() {
  const reply = await fetch("/v1/models", { headers: headers() });
  $("key-label").hidden = reply.status !== 401;
  if (!reply.ok) return;
  [model] = (await reply.json()).data;
  $("name").textContent = model.id;
  document.title = `${model.id} · opdlm`;
  $("rule").replaceChildren(...model.rules.map((rule) => new Option(rule.replace("_", " "), rule)));
  $("rule").value = model.decoding.rule;
  $("threshold").value = model.decoding.threshold ?? model.decoding.upper ?? 0.9;
  $("block").value = Math.round(Math.log2(model.block_size));
  $("temperature").value = model.decoding.temperature;
  showSettings();
}

function element(kind, classes, text = "") {
  const made = document.createElement(kind);
  made.className = classes;
  made.textContent = text;
  return made;
}

function scroll() {
  const near = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160;
  if (near) chat.scrollTop = chat.scrollHeight;
}

// One answer: its tokens, and what is known of its speed.
class Answer {
  constructor(title) {
    this.box = element("section", "answer");
    if (title) this.box.append(element("h3", "", title));
    this.response = element("div", "response");
    this.stats = element("p", "stats", "waiting");
    this.box.append(this.response, this.stats);
    this.tokens = [];
    this.began = performance.now();
  }

  show({ offset, texts, rounds, whole }) {
    texts.forEach((text, i) => this.set(offset + i, text, rounds[i]));
    if (whole) while (this.tokens.length > texts.length) this.tokens.pop().remove();
    const revealed = this.tokens.filter((token) => !token.classList.contains("masked")).length;
    if (revealed) this.stats.textContent = `${revealed} tokens · ${this.speed(revealed)}`;
    scroll();
  }

  set(place, text, round) {
    while (this.tokens.length <= place) {
      this.tokens.push(element("span", "token masked", "▒▒"));
      this.response.append(this.tokens.at(-1));
    }
    const token = this.tokens[place];
    if (text === null) return;
    if (token.classList.contains("masked")) {
      token.className = `token fresh r${Math.min(round, LAST_COLOUR)}`;
      token.title = `round ${round}`;
    }
    if (token.textContent !== text) token.textContent = text;
  }

  write(text, tokens) {
    this.response.textContent += text;
    this.stats.textContent = `${tokens} tokens · ${this.speed(tokens)}`;
    scroll();
  }

  speed(tokens) {
    return `${((1000 * tokens) / Math.max(performance.now() - this.began, 1)).toFixed(1)} tokens/s`;
  }

  end(tokens, steps) {
    this.stats.textContent = `${tokens} tokens in ${steps} steps · ${(tokens / Math.max(steps, 1)).toFixed(2)} per step · ${this.speed(tokens)}`;
    scroll();
  }

  fail(message) {
    this.stats.className = "stats error";
    this.stats.textContent = message;
    scroll();
  }
}

// The JSON of each server-sent event.
async function* events(path, body, signal) {
  const reply = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server has closed the connection");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function student(answer, signal) {
  const body = {
    messages, stream: true, stream_rounds: true, stream_options: { include_usage: true },
    rule: $("rule").value, threshold: Number($("threshold").value), block_size: blockSize(), temperature: Number($("temperature").value),
  };
  let text = "";
  for await (const event of events("/v1/chat/completions", body, signal)) {
    const [choice] = event.choices;
    text += choice?.delta.content ?? "";
    if (choice?.blocks) answer.show(choice.blocks);
    if (event.usage) answer.end(event.usage.completion_tokens, event.usage.steps);
  }
  return text;
}

async function original(answer, signal) {
  const body = { messages, temperature: Number($("temperature").value) };
  let tokens = 0;
  for await (const event of events("/compare", body, signal)) {
    tokens = event.tokens;
    answer.write(event.text, tokens);
  }
  answer.end(tokens, tokens);
}

async function ask(question) {
  running = new AbortController();
  $("send").textContent = "Stop";
  welcome.remove();
  messages.push({ role: "user", content: question });
  const row = element("div", "answers");
  const answers = [new Answer(model?.compare ? `student · ${model.id}` : "")];
  if (model?.compare) answers.push(new Answer(`original · ${model.compare}`));
  row.append(...answers.map((answer) => answer.box));
  chat.append(element("div", "question", question), row);
  chat.scrollTop = chat.scrollHeight;
  const { signal } = running;
  const failed = (answer) => (error) => answer.fail(signal.aborted ? "stopped" : error.message);
  const replies = [student(answers[0], signal).catch(failed(answers[0]))];
  if (answers[1]) replies.push(original(answers[1], signal).catch(failed(answers[1])));
  const [text] = await Promise.all(replies);
  if (text === undefined) messages.pop();
  else if (!signal.aborted) messages.push({ role: "assistant", content: text });
  $("send").textContent = "Send";
  running = null;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("composer").requestSubmit();
  }
});
load();
