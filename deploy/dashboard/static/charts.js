// The charts: one card each, drawn only while they are on the screen; zooming one zooms all.

const ROLE_COLOURS = { rollout: "--rollout", teacher: "--teacher", learner: "--learner", "": "--plain" };
const COLOURS = ["--plain", "--second", "--learner", "--teacher", "--publish"];
const X_TITLES = { response_tokens: "response tokens", batch: "rollout batch", hours: "hours" };
const touch = matchMedia("(pointer: coarse)").matches;

export class Charts {
  /** `reload` is called when another part of the x axis is wanted. */
  constructor(charts, reload) {
    this.reload = reload;
    this.x = "response_tokens";
    this.range = null;
    this.view = 0; // counts changes of the range: Plotly then forgets what a chart was zoomed to
    this.series = {};
    this.cards = charts.map((chart) => this.#card(chart));
    this.observer = new IntersectionObserver((entries) => this.#seen(entries), { rootMargin: "200px" });
    // a card that appears makes its neighbours narrower
    this.sizes = new ResizeObserver((entries) => {
      for (const { target } of entries) if (target.data && target.offsetWidth) Plotly.Plots.resize(target);
    });
    for (const card of this.cards) {
      this.observer.observe(card.element);
      this.sizes.observe(card.plot);
    }
  }

  /** Another axis: "response_tokens", "batch" or "hours". */
  axis(x) {
    this.x = x;
    this.range = null;
    this.view += 1;
  }

  show(series) {
    this.series = series;
    this.extent = extent(series);
    for (const card of this.cards) {
      const known = card.chart.lines.some((line) => series[line.metric]);
      card.element.hidden = card.optional && !known;
      card.dirty = true;
    }
    for (const card of this.cards) if (card.visible) this.#draw(card);
  }

  redraw() {
    this.show(this.series);
  }

  #card(chart) {
    const element = document.createElement("div");
    element.className = "card chart";
    element.dataset.chart = chart.name;
    const title = document.createElement("h3");
    title.textContent = chart.title;
    const unit = document.createElement("span");
    unit.className = "unit";
    unit.textContent = chart.unit;
    title.append(unit);
    const help = document.createElement("p");
    help.className = "help muted small";
    help.textContent = help.title = chart.help;
    const legend = document.createElement("p");
    legend.className = "legend small";
    if (chart.lines.length > 1) {
      chart.lines.forEach((line, i) => {
        const entry = document.createElement("span");
        const dot = document.createElement("i");
        dot.className = "swatch";
        dot.style.background = `var(${colour(line, i)})`;
        entry.append(dot, line.label);
        legend.append(entry);
      });
    }
    const plot = document.createElement("div");
    plot.className = "plot";
    element.append(title, help, legend, plot);
    document.querySelector(`[data-section="${chart.section}"]`).append(element);
    const optional = chart.lines.every((line) => line.style === "points"); // of evaluations, which a run may not have
    element.hidden = optional;
    return { chart, element, plot, visible: false, dirty: false, optional, wired: false };
  }

  #seen(entries) {
    for (const entry of entries) {
      const card = this.cards.find((c) => c.element === entry.target);
      card.visible = entry.isIntersecting;
      if (card.visible && card.dirty) this.#draw(card);
    }
  }

  #draw(card) {
    const traces = card.chart.lines.flatMap((line, i) => this.#traces(line, i));
    card.element.classList.toggle("empty", !traces.length);
    card.dirty = false;
    if (!traces.length) return;
    Plotly.react(card.plot, traces, this.#layout(card.chart), { displayModeBar: false, doubleClick: "autosize" });
    if (!card.wired) {
      card.plot.on("plotly_relayout", (change) => this.#zoomed(change));
      card.wired = true;
    }
  }

  #traces(line, i) {
    const raw = this.series[line.metric];
    if (!raw) return [];
    const smooth = this.series[line.metric + "~"];
    const points = line.style === "points";
    const hue = css(colour(line, i));
    const trace = {
      x: raw.x, y: raw.y, name: line.label, type: "scatter",
      mode: points ? "lines+markers" : "lines",
      line: { color: hue, width: smooth ? 1 : 2, shape: line.style === "step" ? "hv" : "linear" },
      marker: { size: 7, color: hue }, opacity: smooth ? 0.3 : 1, cliponaxis: !points,
      hoverinfo: smooth ? "skip" : "all", showlegend: false,
    };
    if (raw.x.length === 1) trace.mode = "markers";
    if (!smooth) return [trace];
    return [trace, {
      x: smooth.x, y: smooth.y, name: line.label, type: "scatter", mode: raw.x.length === 1 ? "markers" : "lines",
      line: { color: hue, width: 2.25 }, marker: { size: 7, color: hue }, showlegend: false,
    }];
  }

  #layout(chart) {
    const muted = css("--muted"), grid = css("--grid");
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { color: muted, size: 11 }, automargin: true };
    return {
      margin: { l: 44, r: 10, t: 6, b: 34 }, height: chart.name === "throughput" ? 300 : 220,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", color: css("--text"), size: 12 },
      hovermode: "x unified", dragmode: touch ? false : "zoom", uirevision: this.view,
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
      xaxis: {
        ...axis, title: { text: X_TITLES[this.x], font: { color: muted, size: 11 }, standoff: 6 },
        tickformat: this.x === "hours" ? "~g" : "~s", hoverformat: this.x === "hours" ? ".2f" : ",.0f",
        fixedrange: touch, nticks: 6, showgrid: false,
        // the same for all: a metric of few batches stands where its batches are
        ...(this.range ?? this.extent ? { range: this.range ?? this.extent, autorange: false } : { autorange: true }),
      },
      yaxis: {
        ...axis, type: chart.scale, fixedrange: true, tickformat: chart.format, hoverformat: hoverFormat(chart),
        nticks: 6, rangemode: chart.scale === "log" ? "normal" : "tozero", ...(chart.scale === "log" ? { dtick: "D2" } : {}),
        ...(chart.unit === "share" ? { range: [0, 1.02], autorange: false } : {}),
      },
    };
  }

  #zoomed(change) {
    if (change["xaxis.autorange"]) this.range = null;
    else if (change["xaxis.range[0]"] !== undefined) this.range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else return;
    this.view += 1;
    this.reload();
  }
}

/** The part of the x axis that any series covers; null while it is one point. */
function extent(series) {
  let begin = Infinity, end = -Infinity;
  for (const { x } of Object.values(series)) {
    if (x.length) [begin, end] = [Math.min(begin, x[0]), Math.max(end, x[x.length - 1])];
  }
  return begin < end ? [begin, end] : null;
}

function colour(line, i) {
  return line.role ? ROLE_COLOURS[line.role] : COLOURS[i % COLOURS.length];
}

function hoverFormat(chart) {
  return chart.format.includes("%") ? ".1%" : chart.format === "~s" ? ".4~s" : ".4~g";
}

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
