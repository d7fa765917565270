"use strict";

(async function () {
  const $ = (id) => document.getElementById(id);
  const content = JSON.parse($("data").textContent);
  const speeds = content.speeds;
  const state = { step: speeds.indexOf(content.speed), curve: 0, setting: 0 };
  const charts = new Map();

  // Text

  const percent = (share, digits = 2) => (share === null ? "–" : `${(100 * share).toFixed(digits)}\u00a0%`);
  const times = (factor) => `${factor.toFixed(2)}×`;
  const whole = (number) => number.toLocaleString("en-US");
  const count = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  /** A number for people, with the exact one beside it for programs. */
  function setValue(id, text, exact, unit = "") {
    const children = unit ? [text, " ", element("small", {}, unit)] : [text];
    $(id).replaceChildren(...children);
    $(id).dataset.value = exact;
  }

  // What is chosen

  const curve = () => content.curves[state.curve];
  const speed = () => speeds[state.step];

  /** How measured rows ran; no batch size is the stream. */
  const form = (row) => (row.batch_size === null ? "stream" : `batch ${row.batch_size}`);

  /** The fastest full model; with its batch size where that is not the row's own. */
  const fullForm = (row) =>
    (row.full_engine ?? "") + (row.full_batch_size == null || row.full_batch_size === row.batch_size ? "" : `, ${row.full_batch_size}`);

  /** Measurements grouped by dtype, as a stream and by batch size. */
  function settings() {
    const groups = new Map();
    for (const row of curve().benchmark?.rows ?? []) {
      const name = `${row.dtype}, ${form(row)}`;
      groups.set(name, [...(groups.get(name) ?? []), row]);
    }
    return [...groups].map(([name, rows]) => ({ name, rows: rows.sort((a, b) => a.speed - b.speed) }));
  }

  /** Measured speeds below and above the slider; the same row twice where it stands on one. */
  function neighbours(rows) {
    const below = rows.filter((row) => row.speed <= speed() + 1e-9).at(-1);
    const above = rows.find((row) => row.speed >= speed() - 1e-9);
    return [below, above];
  }

  const nearest = (rows) =>
    rows.reduce((best, row) => (Math.abs(row.speed - speed()) < Math.abs(best.speed - speed()) ? row : best));

  // Headline

  function showHeadline() {
    const shown = curve();
    const accuracy = shown.accuracy?.[state.step] ?? null;
    const correlation = shown.correlation?.[state.step] ?? null;
    for (const place of document.querySelectorAll(".quality")) place.textContent = qualityName(shown);
    $("accuracy-heading").textContent = qualityName(shown);
    if (correlation === null) setValue("accuracy", percent(accuracy), accuracy);
    else setValue("accuracy", correlation.toFixed(4), correlation);
    $("accuracy-note").textContent = accuracyNote(shown);
    const layers = shown.averageLayers[state.step];
    setValue("layers", layers.toFixed(2), layers, `of ${shown.layers}`);
    const first = shown.exits[state.step][0] / shown.rows;
    $("layers-note").textContent = `${percent(first, 0)} of the rows leave after layer 1`;
    const speedup = shown.speedup[state.step];
    setValue("flops", times(speedup), speedup);
    const spent = shown.fullFlops / speedup / 1e9;
    const verdict = speedup < 1 ? "slower than the full model: " : "";
    $("flops-note").textContent =
      `${verdict}${spent.toPrecision(3)} of ${(shown.fullFlops / 1e9).toPrecision(3)} GFLOPs a row of ${shown.seqLen} tokens, FastBERT's count`;
    showMeasured();
  }

  const isRegression = (shown) => shown.correlation !== null;
  const qualityName = (shown) => (isRegression(shown) ? "Correlation" : "Accuracy");
  const quality = (shown) => shown.accuracy ?? shown.correlation;
  const qualityText = (shown, value) => (isRegression(shown) ? value.toFixed(4) : percent(value));

  function accuracyNote(shown) {
    const values = quality(shown);
    if (values === null) return "the rows have no labels";
    const bounds = shown.bounds[state.step];
    const digits = (value) => (isRegression(shown) ? value.toFixed(3) : (100 * value).toFixed(1));
    const interval = bounds === null ? "" : `; 95\u00a0% confidence: ${digits(bounds[0])} to ${digits(bounds[1])}${isRegression(shown) ? "" : "\u00a0%"}`;
    if (state.step === 0) return `${isRegression(shown) ? "Pearson's, " : ""}the full model${interval}`;
    if (isRegression(shown)) return `Pearson's; ${values[0].toFixed(4)} in the full model${interval}`;
    const change = 100 * (values[state.step] - values[0]);
    const sign = change > 0 ? "+" : change < 0 ? "−" : "±";
    return `${sign}${Math.abs(change).toFixed(2)} points against the full model's ${percent(values[0])}${interval}`;
  }

  function showMeasured() {
    const all = settings();
    $("measured-card").hidden = !all.length;
    if (!all.length) return;
    const { name, rows } = all[state.setting];
    const [below, above] = neighbours(rows);
    if (state.step === 0) {
      setValue("measured", times(1), 1);
      $("measured-note").textContent = "the full model is the measure of the others";
    } else if (below === above) {
      setValue("measured", times(below.speedup), below.speedup);
      const verdict = below.speedup < 1 ? "slower than the full model" : `${whole(Math.round(below.rows / below.seconds))} rows/s`;
      $("measured-note").textContent = `${verdict}; ${name}`;
    } else if (below && above) {
      setValue("measured", `${below.speedup.toFixed(2)}–${times(above.speedup)}`, "");
      $("measured-note").textContent = `measured at ${below.speed} and ${above.speed}; ${name}`;
    } else {
      const row = below ?? above;
      setValue("measured", times(row.speedup), "");
      $("measured-note").textContent = `measured at ${row.speed}, the ${below ? "highest" : "lowest"} speed measured; ${name}`;
    }
  }

  // Charts: each one is a function of the state

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seriesColour = (index) => colour(`--series-${(index % 6) + 1}`);

  const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.hasAttribute("data-print");

  /** Of a layer, counted from 1. */
  const layerColour = (layer) => curve().layerColours[isDark() ? "dark" : "light"][layer - 1];

  function axis(title, options = {}) {
    return {
      title: { text: title, standoff: 8 }, gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false,
      tickcolor: colour("--line"), automargin: true, fixedrange: true, ...options,
    };
  }

  const percentAxis = (title, options) => axis(title, { tickformat: ".4~p", ...options });
  const speedAxis = () => axis("speed", { range: [-0.02, 1.02], dtick: 0.2 });
  const speedLine = (options = {}) => ({
    type: "line", x0: speed(), x1: speed(), y0: 0, y1: 1, yref: "paper",
    line: { color: colour("--accent"), width: 1.5, dash: "dot" }, ...options,
  });

  function layout(xaxis, yaxis, options = {}) {
    return {
      xaxis, yaxis,
      font: { family: "system-ui, sans-serif", size: 12, color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 48, r: 14, t: 14, b: 40 }, showlegend: false, hovermode: "closest",
      legend: { orientation: "h", y: -0.24, x: 0, yanchor: "top", font: { size: 11.5 } },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      ...options,
    };
  }

  /** A flat curve must look flat: at least two points of accuracy, or 0.02 of a correlation. */
  function accuracyRange(values, lowest = 0) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return undefined;
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const margin = Math.max(0.01 - (high - low) / 2, 0.08 * (high - low));
    return [Math.max(lowest, low - margin), Math.min(1.004, high + margin)];
  }

  const faint = (paint) => `${paint}26`;

  /** Where new rows like these lie with 95 % confidence. */
  function band(shown, xs, paint) {
    const order = [...xs.keys()].filter((step) => shown.bounds[step] !== null).sort((a, b) => xs[a] - xs[b] || a - b);
    const edge = (side) => order.map((step) => shown.bounds[step][side]);
    const along = order.map((step) => xs[step]);
    return {
      x: [...along, ...[...along].reverse()], y: [...edge(0), ...edge(1).reverse()], mode: "lines", fill: "toself", fillcolor: faint(paint),
      line: { width: 0 }, hoverinfo: "skip", showlegend: false, meta: "band",
    };
  }

  /** One panel of figure 3: all curves, the chosen one strongest, with a dot at the chosen speed. */
  function tradePanel(x, y, xaxis, yaxis, hover, options) {
    const data = y === quality ? content.curves.filter(quality).map((shown) => band(shown, x(shown), seriesColour(content.curves.indexOf(shown)))) : [];
    content.curves.forEach((shown, index) => {
      const [xs, ys] = [x(shown), y(shown)];
      if (!xs || !ys) return;
      const chosen = index === state.curve;
      data.push({
        x: xs, y: ys, customdata: speeds, name: shown.name, mode: "lines", opacity: chosen ? 1 : 0.55,
        line: { color: seriesColour(index), width: chosen ? 3 : 2 }, hovertemplate: `${hover}<extra>${escapeText(shown.name)}</extra>`,
      });
      data.push({
        x: [xs[state.step]], y: [ys[state.step]], mode: "markers", showlegend: false, hoverinfo: "skip",
        marker: { color: seriesColour(index), size: chosen ? 13 : 8, line: { color: colour("--card"), width: 2 } },
      });
    });
    return [data, layout(xaxis, yaxis, { showlegend: content.curves.length > 1, ...options })];
  }

  const escapeText = (text) => text.replace(/[<>&]/g, (sign) => ({ "<": "&lt;", ">": "&gt;", "&": "&amp;" })[sign]);
  /** Accuracies are shares; where all curves are regressions, the axis shows correlations. */
  function qualityAxis() {
    const values = content.curves.flatMap((shown) => [...(quality(shown) ?? []), ...(shown.bounds ?? []).flatMap((pair) => pair ?? [])]);
    if (content.curves.every(isRegression)) return axis("", { range: accuracyRange(values, -1), nticks: 6, tickformat: ".3~f" });
    return percentAxis("", { range: accuracyRange(values), nticks: 6 });
  }
  const qualityHover = () => (content.curves.every(isRegression) ? "%{y:.4f}" : "%{y:.2%}");

  /** Room at both ends, so that no point lies on the frame. */
  function speedupRange() {
    const all = content.curves.flatMap((shown) => shown.speedup);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    return [low - 0.05 * (high - low), high + 0.07 * (high - low)];
  }

  function speedAccuracy() {
    return tradePanel(() => speeds, quality, speedAxis(), qualityAxis(), `speed %{x}: ${qualityHover()}`, { shapes: [speedLine()] });
  }

  function speedSpeedup() {
    const [, highest] = speedupRange();
    const full = { ...speedLine(), x0: 0, x1: 1, xref: "paper", y0: 1, y1: 1, yref: "y", line: { color: colour("--muted"), width: 1, dash: "dash" } };
    const slower = { type: "rect", x0: 0, x1: 1, xref: "paper", y0: 0, y1: 1, fillcolor: faint(colour("--bad")), line: { width: 0 }, layer: "below" };
    const isSlower = content.curves.some((shown) => shown.speedup.some((value, step) => step && value < 1));
    const note = { x: 1, xref: "paper", xanchor: "right", y: 1, yanchor: "top", showarrow: false, text: "slower than the full model", font: { size: 11, color: colour("--bad") } };
    return tradePanel(() => speeds, (shown) => shown.speedup, speedAxis(),
      axis("", { range: [0, highest], ticksuffix: "×", nticks: 6 }), "speed %{x}: %{y:.2f}×",
      { shapes: [full, ...(isSlower ? [slower] : []), speedLine()], annotations: isSlower ? [note] : [] });
  }

  function speedupAccuracy() {
    const [data, shape] = tradePanel((shown) => shown.speedup, quality, axis("FLOPs speed-up", { range: speedupRange(), ticksuffix: "×", nticks: 7 }),
      qualityAxis(), `speed %{customdata}: %{x:.2f}×, ${qualityHover()}`);
    return [data, { ...shape, annotations: markedSpeeds() }];
  }

  /** The speeds of the chosen curve beside its points, as far as they stand apart. */
  function markedSpeeds() {
    const shown = curve();
    if (!quality(shown)) return [];
    const [low, high] = speedupRange();
    const marked = [];
    for (const value of [0, 0.3, 0.5, 0.8, 1, 0.1, 0.2, 0.4, 0.6, 0.7, 0.9]) {
      const step = Math.round(value * (speeds.length - 1));
      const x = shown.speedup[step];
      if (marked.every((other) => Math.abs(other.x - x) > 0.09 * (high - low))) {
        marked.push({ x, y: quality(shown)[step], text: String(value), showarrow: false, yshift: 13, font: { size: 11, color: seriesColour(state.curve) } });
      }
    }
    return marked;
  }

  function exits() {
    const shown = curve();
    const shares = shown.exits[state.step].map((rows) => rows / shown.rows);
    const numbers = shares.map((_, index) => index + 1);
    const data = [{
      type: "bar", x: numbers, y: shares, customdata: shown.exits[state.step], cliponaxis: false,
      marker: { color: numbers.map(layerColour) },
      text: shares.map((share) => (share ? `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%` : "")), textposition: "outside",
      textfont: { size: 11, color: colour("--muted") },
      hovertemplate: "after layer %{x}: %{customdata} rows<extra></extra>",
    }];
    return [data, layout(axis("layer", { dtick: 1, showgrid: false }), percentAxis("", { range: [0, 1.1], tickvals: [0, 0.25, 0.5, 0.75, 1] }), { bargap: 0.25 })];
  }

  /** Figure 6: mirrored distributions, cut at the speed into rows that leave and rows that stay. */
  function arrivals() {
    const shown = curve();
    const data = [];
    const notes = [];
    shown.arrivals[state.step].forEach(([rows, ...counts], index) => {
      const isLast = shown.heads[index] === shown.layers;
      const threshold = isLast ? 1 : speed();
      // numbers of more than a dozen layers would lie on each other
      if (index % Math.ceil(shown.heads.length / 12) === 0) notes.push({
        x: index, y: 1.02, yanchor: "bottom", showarrow: false, text: rows ? percent(rows / shown.rows, 0).replace("\u00a0", "") : "–",
        font: { size: 11, color: colour("--muted") },
      });
      if (!rows) return;
      const about = `layer ${shown.heads[index]}: ${count(rows, "row")} arrive`;
      for (const [from, to, paint] of [[0, threshold, "--accent"], [threshold, 1, "--stays"]]) {
        if (to > from) data.push({ ...halfViolin(index, counts, from, to, colour(paint), about), ...(rows < content.fewestRows ? { fillpattern: { shape: "/", fgcolor: colour(paint), bgcolor: "rgba(0,0,0,0)", size: 5 } } : {}) });
      }
    });
    const shapes = [{ ...speedLine(), x0: 0, x1: 1, xref: "paper", y0: speed(), y1: speed(), yref: "y" }];
    const ticks = { tickvals: shown.heads.map((_, index) => index), ticktext: shown.heads.map(String), range: [-0.6, shown.heads.length - 0.4] };
    return [data, layout(axis("layer", { ...ticks, showgrid: false }), axis("uncertainty", { range: [0, 1.12], tickvals: [0, 0.2, 0.4, 0.6, 0.8, 1] }), { shapes, annotations: notes })];
  }

  function halfViolin(centre, counts, from, to, paint, about) {
    const widest = Math.max(...counts);
    const widthAt = (value) => {
      const position = value * counts.length - 0.5;
      const low = Math.max(0, Math.min(counts.length - 1, Math.floor(position)));
      const high = Math.min(counts.length - 1, low + 1);
      const between = Math.max(0, Math.min(1, position - low));
      return (0.42 * (counts[low] * (1 - between) + counts[high] * between)) / widest;
    };
    const centres = counts.map((_, bin) => (bin + 0.5) / counts.length).filter((value) => value > from && value < to);
    const values = [from, ...centres, to];
    const widths = values.map(widthAt);
    return {
      x: [...widths.map((width) => centre - width), ...widths.map((width) => centre + width).reverse()],
      y: [...values, ...[...values].reverse()], mode: "lines", fill: "toself", fillcolor: paint,
      line: { color: paint, width: 1.2 }, hoveron: "fills", text: about, hoverinfo: "text",
    };
  }

  /** Figure 4; the first, a middle and the last head at first. */
  function reliability() {
    const shown = curve();
    const heads = shown.reliability.length;
    const values = (head) => (isRegression(shown) ? head.errors : head.accuracies);
    const atFirst = new Set([0, Math.floor((heads - 1) / 2), heads - 1]);
    const data = shown.reliability.map((head, index) => {
      const total = head.counts.reduce((sum, value) => sum + value, 0);
      const known = [...values(head).keys()].filter((part) => values(head)[part] !== null);
      const paint = layerColour(head.layer);
      const distance = (part, side) => Math.abs(head.bounds[part][side] - values(head)[part]);
      const interval = (part) => `${part / head.counts.length}–${(part + 1) / head.counts.length}`;
      return {
        x: known.map((part) => (part + 0.5) / head.counts.length), y: known.map((part) => values(head)[part]),
        error_y: { type: "data", symmetric: false, array: known.map((part) => distance(part, 1)), arrayminus: known.map((part) => distance(part, 0)), color: paint, thickness: 1, width: 0 },
        customdata: known.map((part) => [interval(part), head.counts[part]]), name: `layer ${head.layer}`,
        mode: "lines+markers", visible: atFirst.has(index) || "legendonly",
        line: { color: paint, width: 2.5 },
        marker: { color: paint, size: known.map((part) => 6 + 14 * Math.sqrt(head.counts[part] / total)), line: { color: colour("--card"), width: 1 } },
        hovertemplate: `uncertainty %{customdata[0]}: ${isRegression(shown) ? "%{y:.3f} on" : "%{y:.1%} of"} %{customdata[1]} rows<extra>%{fullData.name}</extra>`,
      };
    });
    const shapes = [{ type: "rect", x0: 0, x1: speed(), y0: 0, y1: 1, yref: "paper", fillcolor: colour("--accent-soft"), line: { width: 0 }, layer: "below" }, speedLine()];
    const yaxis = isRegression(shown) ? axis("", { rangemode: "tozero" }) : percentAxis("", { range: [0, 1.04] });
    return [data, layout(axis("uncertainty", { range: [0, 1], dtick: 0.1 }), yaxis, { shapes, showlegend: true, uirevision: state.curve })];
  }

  function bench() {
    const groups = settings();
    const rows = groups.map((group) => nearest(group.rows));
    const names = groups.map((group) => group.name.replace(/, (batch )?/, "<br>"));
    const bar = (name, key, paint) => ({
      type: "bar", name, x: names, y: rows.map((row) => row[key]), marker: { color: paint }, cliponaxis: false,
      text: rows.map((row) => `${row[key].toFixed(1)}×`), textposition: "outside", textfont: { size: 10.5, color: colour("--muted") },
      hovertemplate: `%{x}: %{y:.2f}×<extra>${name}</extra>`,
    });
    const data = [bar("FLOPs", "flops_speedup", colour("--stays")), bar("measured", "speedup", colour("--accent"))];
    const shapes = [{ ...speedLine(), x0: 0, x1: 1, xref: "paper", y0: 1, y1: 1, yref: "y", line: { color: colour("--muted"), width: 1.5 } }];
    const highest = Math.max(...(curve().benchmark?.rows ?? []).flatMap((row) => [row.speedup, row.flops_speedup]));
    return [data, layout(axis("dtype, and stream or batch size", { type: "category", showgrid: false, tickangle: 0 }), axis("", { range: [0, highest * 1.12], ticksuffix: "×" }), {
      shapes, barmode: "group", bargap: 0.3, showlegend: true, margin: { l: 48, r: 14, t: 34, b: 40 },
      legend: { orientation: "h", y: 1.03, yanchor: "bottom", x: 0, font: { size: 11.5 } },
    })];
  }

  /** Figure 7: accuracy or correlation above, FLOPs below, over both stages of training. */
  function training() {
    const points = curve().training;
    const isShare = !points.some((point) => point.is_regression);
    const layers = [...new Set(points.flatMap((point) => Object.keys(point.accuracy_by_layer)))];
    const line = (name, y, paint, options = {}) => ({
      x: points.map((point) => point.epoch), y, name, mode: "lines+markers", line: { color: paint, width: 2.5 },
      marker: { size: 8 }, hovertemplate: `epoch %{x:.3~g}: %{y:${isShare ? ".2%" : ".4f"}}<extra>${name}</extra>`, ...options,
    });
    const thin = (layer) => line(`after layer ${layer}`, points.map((point) => point.accuracy_by_layer[layer] ?? null),
      layerColour(layer), { line: { color: layerColour(layer), width: 1.4 }, marker: { size: 4, color: layerColour(layer) } });
    const data = layers.slice(0, -1).map(thin);
    data.push(line("full model", points.map((point) => point.accuracy), colour("--series-3")));
    if (points.some((point) => point.accuracy_at_speed !== null)) {
      data.push(line(`at speed ${content.recordedSpeed}`, points.map((point) => point.accuracy_at_speed), colour("--series-2")));
    }
    data.push(line("FLOPs of the full model's", points.map((point) => point.flops_share), colour("--accent"), { yaxis: "y2", showlegend: false, hovertemplate: "epoch %{x:.3~g}: %{y:.1%}<extra>FLOPs</extra>" }));
    const last = points.findLastIndex((point) => point.stage === "finetune");
    const border = points[last]?.epoch ?? 0;
    const end = points.at(-1)?.epoch ?? 1;
    const shapes = [{ type: "rect", x0: border, x1: end * 1.03, y0: 0, y1: 1, yref: "paper", fillcolor: colour("--accent-soft"), line: { width: 0 }, layer: "below" }];
    const label = (text, from, to) => ({ text, x: (from + to) / 2, y: 1.01, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 11.5, color: colour("--muted") } });
    const annotations = [];
    if (last >= 0) annotations.push(label("fine-tuning", 0, border));
    if (last < points.length - 1) annotations.push(label("self-distillation", border, end));
    const known = points.flatMap((point) => [point.accuracy, point.accuracy_at_speed, ...Object.values(point.accuracy_by_layer)]).filter((value) => value !== null);
    return [data, layout(axis("epoch", { range: [0, end * 1.03], anchor: "y2" }), (isShare ? percentAxis : axis)(isShare ? "accuracy" : "correlation", { domain: [0.42, 1], range: accuracyRange(known, isShare ? 0 : -1), nticks: 6 }), {
      yaxis2: percentAxis("FLOPs", { domain: [0, 0.32], range: [0, 1.08], nticks: 4 }), shapes, annotations, showlegend: true, margin: { l: 56, r: 14, t: 30, b: 40 },
    })];
  }

  function drawCharts() {
    if (!window.Plotly) return; // still being unpacked
    for (const [id, build] of charts) {
      const target = $(id);
      if (!target.clientWidth) continue;
      const [data, shape] = build();
      shape.width = target.clientWidth;
      shape.height = target.clientHeight;
      Plotly.react(target, data, shape, { displayModeBar: false, responsive: false });
      target.setAttribute("role", "img");
      target.setAttribute("aria-label", `${target.closest("figure").querySelector("figcaption").textContent}, at speed ${speed()}`);
    }
  }

  // Tables and texts

  function table(target, headings, rows) {
    const head = element("thead", {}, element("tr", {}, ...headings.map((text) => element("th", { scope: "col" }, text))));
    const body = element("tbody", {}, ...rows.map(({ cells, chosen }) =>
      element("tr", chosen ? { class: "chosen" } : {}, ...cells.map((cell) => element("td", cell.attributes ?? {}, cell.text ?? cell)))));
    target.replaceChildren(head, body);
  }

  function showSweepTable() {
    const shown = curve();
    const steps = [...new Set([...speeds.keys()].filter((step) => step % 20 === 0).concat(state.step))].sort((a, b) => a - b);
    const headings = ["speed", shown.correlation === null ? "accuracy" : "correlation", "average layers", "FLOPs speed-up", ...shown.exits[0].map((_, layer) => `layer ${layer + 1}`)];
    table($("sweep"), headings, steps.map((step) => ({
      chosen: step === state.step,
      cells: [String(speeds[step]), shown.correlation?.[step].toFixed(4) ?? percent(shown.accuracy?.[step] ?? null), shown.averageLayers[step].toFixed(2), times(shown.speedup[step]), ...shown.exits[step].map(whole)],
    })));
  }

  function showBench() {
    const measured = curve().benchmark;
    $("bench-section").hidden = !measured;
    if (!measured) return;
    const machine = measured.machine ?? {};
    const place = machine.device === "cpu" ? `${machine.processor ?? "a processor"}, ${count(machine.threads ?? 1, "thread")}` : machine.device;
    const at = [...new Set(settings().map((group) => nearest(group.rows).speed))].join(", ");
    const streams = measured.rows.some((row) => row.batch_size === null) ? " The stream takes rows as they come; batches were sorted by length." : "";
    const gpu = machine.gpu_columns === "not yet measured" ? " On a GPU: not yet measured." : "";
    $("bench-lead").textContent =
      `Measured on ${place}, torch ${machine.torch ?? "?"}, ${count(measured.rows[0].rows, "row")} a pass; shown at speed ${at}, the measured one nearest to the slider.${streams} Below 1× early exit costs time.${gpu}`;
    const measure = curve().classes === 1 ? "correlation" : "accuracy";
    const measuredQuality = (row) => (row.pearson == null ? percent(row.accuracy ?? null) : row.pearson.toFixed(4));
    const headings = ["dtype", "batch", "speed", measure, "FLOPs", "measured", "seconds", "full model", "rows/s", "best full model"];
    table($("bench-table"), headings, measured.rows.map((row) => ({
      chosen: Math.abs(row.speed - speed()) < 1e-9,
      cells: [row.dtype, row.batch_size === null ? "stream" : String(row.batch_size), String(row.speed), measuredQuality(row), times(row.flops_speedup),
        { text: times(row.speedup), attributes: row.speedup < 1 ? { class: "loses" } : {} },
        row.seconds.toPrecision(3), row.full_seconds.toPrecision(3), whole(Math.round(row.rows / row.seconds)), fullForm(row)],
    })));
  }

  function showTraining() {
    const points = curve().training;
    $("training-section").hidden = !points.length;
    if (!points.length) return;
    const lacks = points.some((point) => point.stage === "distill" && point.flops_share === null);
    $("training-lead").textContent = lacks
      ? `${qualityName(curve())} after every layer; FLOPs were recorded in fine-tuning only.`
      : `Fine-tuning teaches the backbone and the last head; self-distillation teaches the others, and FLOPs at speed ${content.recordedSpeed} fall.`;
  }

  function showExamples() {
    const examples = curve().examples;
    $("examples-section").hidden = !examples;
    $("examples-lead").textContent = "The rows that were surest soonest, and those that were least sure at the end.";
    for (const end of ["first", "last"]) {
      $(end).replaceChildren(...(examples?.[end][state.step] ?? []).map((entry) => exampleItem(examples, entry)));
    }
  }

  function exampleItem(examples, [row, layer, uncertainty, predicted]) {
    const truth = examples.labels?.[row];
    const chips = [
      element("span", { class: "layer" }, `layer ${layer}`),
      element("span", {}, uncertainty === null ? "uncertainty not a number" : `uncertainty ${uncertainty.toFixed(3)}`),
      element("span", {}, `answer: ${examples.labelNames[predicted] ?? predicted}`),
    ];
    if (curve().classes === 1) {
      if (truth !== undefined) chips.push(element("span", {}, `label: ${truth}`));
    } else if (truth !== undefined && truth !== predicted) chips.push(element("span", { class: "wrong" }, `wrong, it is ${examples.labelNames[truth] ?? truth}`));
    return element("li", {}, element("p", {}, examples.texts[row]), element("div", { class: "chips" }, ...chips));
  }

  function showCertificate() {
    const certificate = curve().certificate;
    $("certificate-section").hidden = !certificate;
    if (!certificate) return;
    const shares = new Set(["max_drop", "confidence", "bound", "accuracy", "full_accuracy", "agreement"]);
    const list = element("dl");
    for (const [name, value] of Object.entries(certificate)) {
      if (value === null) continue;
      const shown = shares.has(name) ? percent(value) : typeof value === "object" ? JSON.stringify(value) : String(value);
      list.append(element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, shown));
    }
    $("certificate").replaceChildren(element("p", {}, element("strong", {}, `Calibrated for speed ${certificate.speed ?? "?"}.`)), list);
  }

  function showSubtitle() {
    const shown = curve();
    const kind = shown.classes === 1 ? "regression" : `${shown.classes} classes`;
    $("subtitle").textContent = `${shown.name}: ${shown.about}; ${kind}, criterion ${shown.criterion}`;
  }

  function showLeads() {
    const shown = curve();
    const bands = content.curves.some((entry) => entry.bounds?.some((pair) => pair !== null))
      ? ` Bands: where new rows like these lie with 95\u00a0% confidence. All speeds answer the same rows, so a difference between two points of a curve is surer than its band.` : "";
    $("trade-lead").textContent = `Every point of a curve is one speed. The dot is the speed chosen above.${bands}`;
    const known = shown.reliability.some((head) => head.bounds.some((pair) => pair !== null));
    if (charts.has("reliability")) $("reliability").closest("section").hidden = !known;
    $("reliability-caption").textContent = `${isRegression(shown) ? "Mean absolute error" : "Accuracy"} by uncertainty, head by head`;
    $("reliability-lead").textContent = isRegression(shown)
      ? "It is if the curves rise: the surer a head, the smaller its error. The shaded part is who leaves."
      : "It is if the curves fall: the surer a head, the more often it is right. The shaded part is who leaves.";
    $("few-rows").textContent = `; hatched: fewer than ${content.fewestRows} rows`;
    $("reliability-key").textContent =
      `Larger dots stand for more rows, lines at dots for 95\u00a0% confidence; intervals with fewer than ${content.fewestRows} rows are left out. Choose heads in the legend.`;
  }

  function fillSettings() {
    const names = settings().map((group) => group.name);
    state.setting = Math.min(state.setting, Math.max(names.length - 1, 0));
    $("setting").replaceChildren(...names.map((name, index) => element("option", { value: index }, name)));
    $("setting").value = state.setting;
    $("setting-choice").hidden = names.length < 2;
  }

  function fillPresets() {
    const certified = curve().certificate?.speed;
    const values = [0, 0.1, 0.3, 0.5, 0.8];
    const buttons = values.map((value) => element("button", { type: "button", value }, String(value)));
    if (typeof certified === "number") buttons.push(element("button", { type: "button", value: certified, title: "the calibrated speed" }, `✓ ${certified}`));
    for (const button of buttons) button.addEventListener("click", () => moveTo(Number(button.value)));
    $("presets").replaceChildren(...buttons);
  }

  // The state changes

  function showSpeed() {
    const now = speed();
    $("speed").value = now;
    $("speed").setAttribute("aria-valuetext", now === 0 ? "0, the full model" : String(now));
    $("speed-value").textContent = String(now);
    for (const button of $("presets").children) button.setAttribute("aria-pressed", String(Number(button.value) === now));
  }

  function showCurve() {
    charts.delete("bench");
    charts.delete("training");
    if (curve().benchmark) charts.set("bench", bench);
    if (curve().training.length) charts.set("training", training);
    fillPresets();
    fillSettings();
    showSubtitle();
    showLeads();
    showTraining();
    showCertificate();
  }

  function showAll() {
    showSpeed();
    showHeadline();
    showSweepTable();
    showBench();
    showExamples();
    drawCharts();
  }

  let isWaiting = false;
  /** At most one drawing a frame, however fast the slider moves. */
  function redraw() {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      showAll();
    });
  }

  function moveTo(value) {
    state.step = Math.max(0, Math.min(speeds.length - 1, Math.round(value * (speeds.length - 1))));
    redraw();
  }

  function connect() {
    $("speed").addEventListener("input", (event) => moveTo(Number(event.target.value)));
    $("curve").append(...content.curves.map((shown, index) => element("option", { value: index }, shown.name)));
    $("curve-choice").hidden = content.curves.length < 2;
    $("curve").addEventListener("change", (event) => {
      state.curve = Number(event.target.value);
      showCurve();
      redraw();
    });
    $("setting").addEventListener("change", (event) => {
      state.setting = Number(event.target.value);
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("resize", redraw);
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
  }

  function print(starts) {
    document.documentElement.toggleAttribute("data-print", starts);
    drawCharts();
  }

  async function unpackPlotly() {
    const packed = Uint8Array.from(atob($("plotly").textContent), (sign) => sign.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(element("script", {}, await new Response(stream).text()));
  }

  function chooseCharts() {
    const hasLabels = content.curves.some((shown) => quality(shown) !== null);
    const all = { "speed-accuracy": speedAccuracy, "speed-speedup": speedSpeedup, "speedup-accuracy": speedupAccuracy, exits, arrivals, reliability };
    const needLabels = ["speed-accuracy", "speedup-accuracy", "reliability"];
    for (const [id, build] of Object.entries(all)) {
      if (hasLabels || !needLabels.includes(id)) charts.set(id, build);
      else $(id).closest("figure").hidden = true;
    }
    if (!hasLabels) $("reliability").closest("section").hidden = true;
  }

  chooseCharts();
  connect();
  showCurve();
  $("footer").textContent =
    `${content.date}. Confidence: Wilson's intervals of accuracies, bootstrap over rows of correlations. FLOPs as FastBERT counts them.${content.curves.some((shown) => shown.benchmark) ? " Seconds are medians of interleaved passes." : ""} Charts by plotly.js (MIT licence).`;
  showSpeed();
  showHeadline();
  try {
    await unpackPlotly();
  } catch (error) {
    $("failure").textContent = `The charts cannot be drawn: this browser does not unpack gzip (${error}). Browsers since 2023 do.`;
    $("failure").hidden = false;
    return;
  }
  showAll();
  document.documentElement.dataset.ready = "true";
})();
