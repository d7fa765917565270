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
    $("accuracy-heading").textContent = correlation === null ? "Accuracy" : "Correlation";
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
    $("flops-note").textContent =
      `${spent.toPrecision(3)} of ${(shown.fullFlops / 1e9).toPrecision(3)} GFLOPs a row of ${shown.seqLen} tokens, FastBERT's count`;
    showMeasured();
  }

  function accuracyNote(shown) {
    if (shown.correlation !== null)
      return state.step === 0 ? "the full model" : `Pearson's; ${shown.correlation[0].toFixed(4)} in the full model`;
    if (shown.accuracy === null) return "the traced rows have no labels";
    const change = 100 * (shown.accuracy[state.step] - shown.accuracy[0]);
    if (state.step === 0) return "the full model";
    const sign = change > 0 ? "+" : change < 0 ? "−" : "±";
    return `${sign}${Math.abs(change).toFixed(2)} points against the full model's ${percent(shown.accuracy[0])}`;
  }

  function showMeasured() {
    const all = settings();
    if (!all.length) {
      setValue("measured", "–", "");
      $("measured-note").textContent = "not measured; fastkd bench does it";
      return;
    }
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

  /** Evenly from the colour of the first layer to that of the last. */
  function layerColour(index, layers) {
    const [from, to] = ["--first-layer", "--last-layer"].map((name) =>
      [1, 3, 5].map((start) => parseInt(colour(name).slice(start, start + 2), 16)));
    const share = layers > 1 ? index / (layers - 1) : 1;
    return `rgb(${from.map((value, channel) => Math.round(value + share * (to[channel] - value))).join(",")})`;
  }

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

  /** A flat curve must look flat: at least two points of accuracy. */
  function accuracyRange(values) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return undefined;
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const margin = Math.max(0.01 - (high - low) / 2, 0.08 * (high - low));
    return [Math.max(0, low - margin), Math.min(1.004, high + margin)];
  }

  /** One panel of figure 3: all curves, the chosen one strongest, with a dot at the chosen speed. */
  function tradePanel(x, y, xaxis, yaxis, hover, options) {
    const data = [];
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
  const allAccuracies = () => content.curves.flatMap((shown) => shown.accuracy ?? []);

  function speedAccuracy() {
    return tradePanel(() => speeds, (shown) => shown.accuracy, speedAxis(),
      percentAxis("", { range: accuracyRange(allAccuracies()), nticks: 6 }), "speed %{x}: %{y:.2%}", { shapes: [speedLine()] });
  }

  function speedSpeedup() {
    return tradePanel(() => speeds, (shown) => shown.speedup, speedAxis(),
      axis("", { rangemode: "tozero", ticksuffix: "×", nticks: 6 }), "speed %{x}: %{y:.2f}×", { shapes: [speedLine()] });
  }

  function speedupAccuracy() {
    return tradePanel((shown) => shown.speedup, (shown) => shown.accuracy, axis("FLOPs speed-up", { ticksuffix: "×", nticks: 7 }),
      percentAxis("", { range: accuracyRange(allAccuracies()), nticks: 6 }), "speed %{customdata}: %{x:.2f}×, %{y:.2%}");
  }

  function exits() {
    const shown = curve();
    const shares = shown.exits[state.step].map((rows) => rows / shown.rows);
    const numbers = shares.map((_, index) => index + 1);
    const data = [{
      type: "bar", x: numbers, y: shares, customdata: shown.exits[state.step], cliponaxis: false,
      marker: { color: numbers.map((_, index) => layerColour(index, shown.layers)) },
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
      notes.push({
        x: index, y: 1.02, yanchor: "bottom", showarrow: false, text: rows ? percent(rows / shown.rows, 0).replace("\u00a0", "") : "–",
        font: { size: 11, color: colour("--muted") },
      });
      if (!rows) return;
      const about = `layer ${shown.heads[index]}: ${count(rows, "row")} arrive`;
      for (const [from, to, paint] of [[0, threshold, "--accent"], [threshold, 1, "--stays"]]) {
        if (to > from) data.push(halfViolin(index, counts, from, to, colour(paint), about));
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
    const atFirst = new Set([0, Math.floor((heads - 1) / 2), heads - 1]);
    const data = shown.reliability.map((head, index) => {
      const total = head.counts.reduce((sum, value) => sum + value, 0);
      const known = head.accuracies.map((value, part) => part).filter((part) => head.accuracies[part] !== null);
      const interval = (part) => `${part / head.counts.length}–${(part + 1) / head.counts.length}`;
      return {
        x: known.map((part) => (part + 0.5) / head.counts.length), y: known.map((part) => head.accuracies[part]),
        customdata: known.map((part) => [interval(part), head.counts[part]]), name: `layer ${head.layer}`,
        mode: "lines+markers", visible: atFirst.has(index) || "legendonly",
        line: { color: layerColour(index, heads), width: 2.5 },
        marker: { color: layerColour(index, heads), size: known.map((part) => 6 + 14 * Math.sqrt(head.counts[part] / total)), line: { color: colour("--card"), width: 1 } },
        hovertemplate: "uncertainty %{customdata[0]}: %{y:.1%} of %{customdata[1]} rows<extra>%{fullData.name}</extra>",
      };
    });
    const shapes = [{ type: "rect", x0: 0, x1: speed(), y0: 0, y1: 1, yref: "paper", fillcolor: colour("--accent-soft"), line: { width: 0 }, layer: "below" }, speedLine()];
    return [data, layout(axis("uncertainty", { range: [0, 1], dtick: 0.1 }), percentAxis("", { range: [0, 1.04] }), { shapes, showlegend: true, uirevision: state.curve })];
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

  /** Figure 7: accuracy above, FLOPs below, over both stages of training. */
  function training() {
    const points = curve().training;
    const layers = [...new Set(points.flatMap((point) => Object.keys(point.accuracy_by_layer)))];
    const line = (name, y, paint, options = {}) => ({
      x: points.map((point) => point.epoch), y, name, mode: "lines+markers", line: { color: paint, width: 2.5 },
      marker: { size: 8 }, hovertemplate: `epoch %{x:.3~g}: %{y:.2%}<extra>${name}</extra>`, ...options,
    });
    const thin = (layer, index) => line(`after layer ${layer}`, points.map((point) => point.accuracy_by_layer[layer] ?? null),
      layerColour(index, layers.length), { line: { color: layerColour(index, layers.length), width: 1.2 }, marker: { size: 4, color: layerColour(index, layers.length) } });
    const data = layers.slice(0, -1).map(thin);
    data.push(line("full model", points.map((point) => point.accuracy), colour("--series-3")));
    if (points.some((point) => point.accuracy_at_speed !== null)) {
      data.push(line(`at speed ${content.recordedSpeed}`, points.map((point) => point.accuracy_at_speed), colour("--series-2")));
    }
    data.push(line("FLOPs of the full model's", points.map((point) => point.flops_share), colour("--accent"), { yaxis: "y2", showlegend: false }));
    const last = points.findLastIndex((point) => point.stage === "finetune");
    const border = points[last]?.epoch ?? 0;
    const end = points.at(-1)?.epoch ?? 1;
    const shapes = [{ type: "rect", x0: border, x1: end * 1.03, y0: 0, y1: 1, yref: "paper", fillcolor: colour("--accent-soft"), line: { width: 0 }, layer: "below" }];
    const label = (text, from, to) => ({ text, x: (from + to) / 2, y: 1.01, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 11.5, color: colour("--muted") } });
    const annotations = [];
    if (last >= 0) annotations.push(label("fine-tuning", 0, border));
    if (last < points.length - 1) annotations.push(label("self-distillation", border, end));
    const known = points.flatMap((point) => [point.accuracy, point.accuracy_at_speed, ...Object.values(point.accuracy_by_layer)]).filter((value) => value !== null);
    return [data, layout(axis("epoch", { range: [0, end * 1.03], anchor: "y2" }), percentAxis("accuracy", { domain: [0.42, 1], range: accuracyRange(known), nticks: 6 }), {
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
    $("bench-figure").hidden = $("bench-details").hidden = !measured;
    if (!measured) {
      $("bench-lead").replaceChildren("Not measured. ", element("code", {}, "fastkd bench MODEL DATA"), " measures it; pass its bench.json with --bench.");
      return;
    }
    const machine = measured.machine ?? {};
    const place = machine.device === "cpu" ? `${machine.processor ?? "a processor"}, ${count(machine.threads ?? 1, "thread")}` : machine.device;
    const at = [...new Set(settings().map((group) => nearest(group.rows).speed))].join(", ");
    const streams = measured.rows.some((row) => row.batch_size === null) ? " The stream is what fastkd predict runs." : "";
    const gpu = machine.gpu_columns === "not yet measured" ? " On a GPU: not yet measured." : "";
    $("bench-lead").textContent =
      `Measured on ${place}, torch ${machine.torch ?? "?"}, ${count(measured.rows[0].rows, "row")} a pass; shown at speed ${at}, the measured one nearest to the slider.${streams} Below 1× early exit costs time.${gpu}`;
    const headings = ["dtype", "batch", "speed", "accuracy", "FLOPs", "measured", "seconds", "full model", "rows/s", "best full model"];
    table($("bench-table"), headings, measured.rows.map((row) => ({
      chosen: Math.abs(row.speed - speed()) < 1e-9,
      cells: [row.dtype, row.batch_size === null ? "stream" : String(row.batch_size), String(row.speed), percent(row.accuracy), times(row.flops_speedup),
        { text: times(row.speedup), attributes: row.speedup < 1 ? { class: "loses" } : {} },
        row.seconds.toPrecision(3), row.full_seconds.toPrecision(3), whole(Math.round(row.rows / row.seconds)), fullForm(row)],
    })));
  }

  function showTraining() {
    const points = curve().training;
    $("training-figure").hidden = !points.length;
    if (!points.length) {
      $("training-lead").textContent = "No log of a training with dev rows was given; pass trainer_log.json of the model folders with --log.";
      return;
    }
    const lacks = points.some((point) => point.stage === "distill" && point.flops_share === null);
    $("training-lead").textContent = lacks
      ? "Accuracy after every layer. This log was written before distillation recorded its FLOPs, so the lower part ends with fine-tuning."
      : `Fine-tuning teaches the backbone and the last head; self-distillation teaches the others, and FLOPs at speed ${content.recordedSpeed} fall.`;
  }

  function showExamples() {
    const examples = curve().examples;
    $("examples-grid").hidden = !examples;
    $("examples-lead").textContent = examples
      ? "The rows that were surest soonest, and those that were least sure at the end."
      : "No texts were given; pass the file that was traced with --examples.";
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
    if (truth !== undefined && truth !== predicted) chips.push(element("span", { class: "wrong" }, `wrong, it is ${examples.labelNames[truth] ?? truth}`));
    return element("li", {}, element("p", {}, examples.texts[row]), element("div", { class: "chips" }, ...chips));
  }

  function showCertificate() {
    const certificate = curve().certificate;
    if (!certificate) {
      $("certificate").replaceChildren(
        element("p", {}, "Not calibrated: this speed has no guarantee yet."),
        element("p", {}, element("code", {}, "fastkd calibrate MODEL DATA")),
      );
      return;
    }
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
    $("subtitle").textContent =
      `${shown.name}: ${count(shown.rows, "row")}, ${shown.classes} classes, ${count(shown.layers, "layer")}, criterion ${shown.criterion}`;
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
    const hasLabels = content.curves.some((shown) => shown.accuracy !== null);
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
    `Written by fastkd report on ${content.date}. Every number of the headline is what ExitTrace.sweep gives at that speed; seconds are medians of interleaved passes. Charts by plotly.js (MIT licence).`;
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
