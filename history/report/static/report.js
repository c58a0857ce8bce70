// The charts of a report. Each figure is a function of what is chosen that gives traces, a layout, a caption that says
// its finding in numbers, and the rows of its table; `draw` shows it. Text goes into the page as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const chosen = { run: 0, layer: 0, step: 0 };
  const MISSING = 0, COMPLETE = 1, INCOMPLETE = 2, NOT_FINITE = 3;
  const MAGMA = ["#000004", "#140e36", "#3b0f70", "#641a80", "#8c2981", "#b73779", "#de4968", "#f7705c", "#fe9f6d", "#fecf92", "#fcfdbf"]
    .map((colour, place) => [place / 10, colour]);
  const LOWEST = 1e-5;
  const NAMES = {
    effective_dimension: "effective dimension", hard_utilization: "hard utilization", soft_utilization: "soft utilization",
    hard_rank: "hard rank", soft_rank: "soft rank", spectral_concentration: "spectral concentration", power_law_alpha: "power-law α",
  };

  // ——— values

  const known = (values) => values.filter((value) => value !== null && value !== undefined);
  const median = (values) => {
    const sorted = known(values).sort((a, b) => a - b);
    if (!sorted.length) return null;
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  };
  const short = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
    return Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
  };
  // Plotly reads a little HTML in names and labels.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const few = (count, most) => {
    const kept = new Set();
    for (let place = 0; place < Math.min(count, most); place++)
      kept.add(Math.round(count <= most ? place : (place * (count - 1)) / (most - 1)));
    return [...kept];
  };
  const run = () => data.runs[chosen.run];
  const row = () => run().layers.indexOf(chosen.layer);
  const series = (which, name, layer) => {
    const place = which.layers.indexOf(layer);
    return which.cells[name] && place >= 0 ? which.cells[name][place] : which.steps.map(() => null);
  };
  const overLayers = (which, name) =>
    which.steps.map((_, column) => (which.cells[name] ? median(which.cells[name].map((values) => values[column])) : null));

  // ——— looks

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (place) => variable("--s" + (place % 6));
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const axis = (title, more) => ({
    title: { text: title, font: { size: 12 }, standoff: 6 }, gridcolor: variable("--grid"), linecolor: variable("--line"),
    zeroline: false, automargin: true, tickfont: { size: 11 }, ...more,
  });
  const log = (title, more) => axis(title, { type: "log", exponentformat: "power", dtick: 1, ...more });
  const MARKS = (digits) => Array.from({ length: 16 }, (_, power) => digits.map((digit) => Number(digit + "e" + (power - 8)))).flat();
  // A logarithmic axis with plain numbers for values that span few decades.
  const plainLog = (title, values) => {
    const found = known(values.flat()).filter((value) => value > 0);
    const low = found.reduce((a, b) => Math.min(a, b), Infinity) / 1.15, high = found.reduce((a, b) => Math.max(a, b), 0) * 1.15;
    const between = (digits) => MARKS(digits).filter((mark) => mark >= low && mark <= high);
    const ticks = [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1]].map(between).find((marks) => marks.length <= 7) ?? between([1]);
    const more = found.length ? { range: [Math.log10(low), Math.log10(high)], tickvals: ticks, ticktext: ticks.map(String) } : {};
    return axis(title, { type: "log", ...more });
  };
  const layout = (title, x, y, more) => ({
    title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left", y: 0.97, yanchor: "top" },
    xaxis: x, yaxis: y, margin: { l: 52, r: 12, t: 36, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: variable("--ink"), family: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 12 },
    hoverlabel: { font: { size: 12 } }, legend: { font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" }, showlegend: true,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--soft"), activecolor: variable("--ink") }, ...more,
  });
  const below = { legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top", font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" } };
  const line = (name, x, y, place, more) => ({
    type: "scatter", mode: x.length < 3 ? "lines+markers" : "lines", name: plain(name), x, y, connectgaps: false,
    line: { color: colour(place), width: 2, dash: DASHES[Math.floor(place / 6) % 4] },
    hovertemplate: "%{x}: %{y:.4g}<extra>" + plain(name) + "</extra>", ...more,
  });
  const thin = (place, dash) => ({ line: { color: colour(place), width: 1.5, dash } });

  // ——— layer × step

  const edges = (steps) => {
    if (steps.length === 1) return [steps[0] - 0.5, steps[0] + 0.5];
    const half = steps.slice(1).map((step, place) => (step + steps[place]) / 2);
    return [2 * steps[0] - half[0], ...half, 2 * steps.at(-1) - half.at(-1)];
  };

  const frame = () => {
    const which = run(), place = row(), bounds = edges(which.steps);
    const step = steps()[chosen.step];
    const column = which.steps.reduce((best, one, index) => (Math.abs(one - step) < Math.abs(which.steps[best] - step) ? index : best), 0);
    const around = { type: "rect", layer: "above", x0: bounds[column], x1: bounds[column + 1], y0: place - 0.5, y1: place + 0.5 };
    // Black in white is seen on every colour.
    return [{ ...around, line: { color: "#ffffff", width: 5 } }, { ...around, line: { color: "#000000", width: 2 } }];
  };

  const scaleOf = (values, logarithmic) => {
    if (!logarithmic) return { low: 0, high: 1, ticks: [0, 0.25, 0.5, 0.75, 1] };
    const found = known(values.flat()).map((value) => Math.min(1, Math.max(LOWEST, value)));
    const most = found.reduce((a, b) => Math.max(a, b), found.length ? LOWEST : 1);
    const least = found.reduce((a, b) => Math.min(a, b), 1);
    const of = (digits) => [-5, -4, -3, -2, -1].flatMap((power) => digits.map((digit) => digit * 10 ** power)).concat(1);
    const between = (marks) => {
      const high = marks.find((mark) => mark >= most * 0.9999) ?? 1;
      const low = marks.filter((mark) => mark <= Math.max(Math.min(least, high / 10), LOWEST) * 1.0001).at(-1) ?? LOWEST;
      return { low, high, ticks: marks.filter((mark) => mark >= low * 0.9999 && mark <= high * 1.0001) };
    };
    const fine = between(of([1, 2, 5]));
    return fine.ticks.length > 7 ? between(of([1])) : fine;
  };

  const cached = new Map();
  const heatmap = (which, name, title, unit, scale, logarithmic, bounds) => {
    const key = which.id + "/" + name;
    if (!cached.has(key)) {
      const values = which.cells[name] ?? which.layers.map(() => which.steps.map(() => null));
      const range = bounds ?? scaleOf(values, logarithmic);
      const seen = (value) => (value === null ? null : logarithmic ? Math.log10(Math.min(range.high, Math.max(range.low, value))) : value);
      const marks = { x: [], y: [] };
      which.quality.forEach((flags, layer) => flags.forEach((flag, column) => {
        if (flag === NOT_FINITE) { marks.x.push(which.steps[column]); marks.y.push(layer); }
      }));
      cached.set(key, {
        values, range, marks, z: values.map((cells) => cells.map(seen)),
        text: values.map((cells, layer) => cells.map((value, column) =>
          "layer " + which.layers[layer] + ", step " + which.steps[column] + "<br>" + title.toLowerCase() + " " +
          (which.quality[layer][column] === NOT_FINITE ? "not finite" : short(value)))),
      });
    }
    const { values, range, marks, z, text } = cached.get(key);
    const place = (value) => (logarithmic ? Math.log10(value) : value);
    const every = Math.ceil(which.layers.length / 16);
    const named = which.layers.map((layer, index) => [index, layer]).filter(([index]) => index % every === 0);
    const traces = [{
      type: "heatmap", x: edges(which.steps), y: which.layers.map((_, index) => index), z, text, hoverinfo: "text",
      zmin: place(range.low), zmax: place(range.high), colorscale: scale, xgap: 0, ygap: which.layers.length > 40 ? 0 : 1,
      colorbar: {
        orientation: "h", thickness: 10, y: -0.18, yanchor: "top", len: 1, title: { text: unit, side: "bottom", font: { size: 11 } },
        tickvals: range.ticks.map(place), ticktext: range.ticks.map((tick) => String(Number(tick.toPrecision(3)))), tickfont: { size: 11 }, outlinewidth: 0,
      },
    }];
    if (marks.x.length)
      traces.push({ type: "scatter", mode: "markers", x: marks.x, y: marks.y, hoverinfo: "skip", marker: { symbol: "x-thin-open", size: 7, color: variable("--ink") } });
    return {
      traces,
      layout: layout(title, axis("step"), axis("layer", { tickvals: named.map(([index]) => index), ticktext: named.map(([, layer]) => String(layer)), showgrid: false }),
        { showlegend: false, shapes: frame(), margin: { l: 46, r: 8, t: 36, b: 84 }, plot_bgcolor: variable("--line") }),
      caption: heatCaption(which, title, values) + (marks.x.length ? " × marks activations that were not finite." : "") +
        (which.sampled > which.steps.length ? ` ${which.steps.length} of ${which.sampled} sampled steps are shown.` : ""),
      head: ["layer", ...few(which.steps.length, 8).map((column) => "step " + which.steps[column])],
      rows: which.layers.map((layer, index) => [layer, ...few(which.steps.length, 8).map((column) => short(values[index][column]))]),
    };
  };

  const heatCaption = (which, title, values) => {
    const columns = which.steps.map((_, column) => values.map((cells) => cells[column]));
    const first = columns.findIndex((cells) => known(cells).length), last = columns.findLastIndex((cells) => known(cells).length);
    if (first < 0) return title + ": nothing was recorded.";
    const ends = columns[last], least = Math.min(...known(ends)), most = Math.max(...known(ends));
    return `${title} of the median layer went from ${short(median(columns[first]))} at step ${which.steps[first]} to ${short(median(ends))} at step ${which.steps[last]}; ` +
      `there it lies between ${short(least)} in layer ${which.layers[ends.indexOf(least)]} and ${short(most)} in layer ${which.layers[ends.indexOf(most)]}.`;
  };

  // ——— spectra

  const steps = () => (run().spectra.steps.length ? run().spectra.steps : run().steps);
  const spectrumAt = (which, layer, step) => which.items[layer + "/" + step];

  const noSpectrum = (x, y) => ({
    traces: [], layout: layout("", x, y, { showlegend: false }), head: [], rows: [],
    caption: `Layer ${chosen.layer} has no stored spectrum at step ${steps()[chosen.step] ?? "–"}` +
      (run().spectra.steps.length ? "; layers and steps with one are " + layersWithSpectra() + "." : "."),
  });
  const layersWithSpectra = () => [...new Set(Object.keys(run().spectra.items).map((key) => Number(key.split("/")[0])))].sort((a, b) => a - b).join(", ");

  const spectrum = () => {
    const which = run(), step = steps()[chosen.step], first = steps()[0];
    const x = log("direction"), y = log("share of the variance");
    const item = spectrumAt(which.spectra, chosen.layer, step);
    if (!item) return noSpectrum(x, y);
    const [width, share, , alpha, level, expert] = item, directions = which.spectra.directions[width];
    const positive = (values) => values.map((value) => (value > 0 ? value : null));
    const traces = [line(`step ${step}`, directions, positive(share), 0, { line: { color: colour(0), width: 2.5 } })];
    const fit = alpha === null ? null : directions.map((direction) => Math.exp(level) * direction ** -alpha);
    if (fit) traces.push(line(`fit, α = ${short(alpha)}`, directions, fit, 1, thin(1, "dash")));
    const before = spectrumAt(which.spectra, chosen.layer, first);
    if (before && step !== first) traces.push(line(`step ${first}`, which.spectra.directions[before[0]], positive(before[1]), 2, thin(2, "dot")));
    const pre = spectrumAt(which.pre, chosen.layer, step);
    if (pre) traces.push(line("before the nonlinearity", which.pre.directions[pre[0]], positive(pre[1]), 3, thin(3, "dashdot")));
    const floor = Math.min(...known(positive(share)));
    const kept = few(directions.length, 16);
    return {
      traces, layout: layout(`Layer ${chosen.layer}, step ${step}`, x, { ...y, range: [Math.log10(Math.max(floor / 2, 1e-9)), 0.15] }, below),
      caption: `The first of ${width} directions carries ${short(100 * share[0])} % of the variance` +
        (fit ? `; the fitted power law falls with α = ${short(alpha)} (healthy large LLaMAs: 1.1 to 1.3).` : "; there is no power law to fit.") +
        (expert === null ? "" : ` Expert ${expert}, of the median hard rank.`),
      head: ["direction", "share of the variance", "fit"],
      rows: kept.map((place) => [directions[place], short(share[place]), fit ? short(fit[place]) : "–"]),
    };
  };

  const cumulative = () => {
    const which = run(), step = steps()[chosen.step];
    const x = axis("share of the directions", { range: [0, 1], tickformat: ".0%" }), y = axis("share of the variance", { range: [0, 1.02], tickformat: ".0%" });
    const item = spectrumAt(which.spectra, chosen.layer, step);
    if (!item) return noSpectrum(x, y);
    const [width, , sums] = item, places = which.spectra.directions[width].map((direction) => direction / width);
    const grey = variable("--soft");
    const traces = Object.entries(data.templates[width] ?? {}).map(([alpha, [tx, ty]], place) =>
      line(`template α = ${alpha}`, tx, ty, 0, { line: { color: grey, width: 1.2, dash: ["dot", "dash", "dashdot"][place] }, hoverinfo: "skip", hovertemplate: undefined }));
    const others = which.layers.filter((layer) => layer !== chosen.layer && spectrumAt(which.spectra, layer, step));
    few(others.length, 12).map((index) => others[index]).forEach((layer, place) => {
      const [other, , curve] = spectrumAt(which.spectra, layer, step);
      traces.push(line("other layers", which.spectra.directions[other].map((direction) => direction / other), curve, 5,
        { line: { color: colour(5), width: 0.7 }, opacity: 0.7, hoverinfo: "skip", hovertemplate: undefined, showlegend: place === 0, legendgroup: "others" }));
    });
    traces.push(line(`layer ${chosen.layer}`, places, sums, 0, { line: { color: colour(0), width: 2.8 } }));
    const upTo = (fraction) => {
      const after = places.findIndex((place) => place >= fraction);
      if (after <= 0) return sums[0];
      const part = (fraction - places[after - 1]) / (places[after] - places[after - 1]);
      return sums[after - 1] + part * (sums[after] - sums[after - 1]);
    };
    const kept = few(places.length, 16);
    return {
      traces, layout: layout(`Cumulative variance, step ${step}`, x, y, below),
      caption: `Layer ${chosen.layer} has ${short(100 * upTo(0.1))} % of its variance in the first tenth of its directions and ${short(100 * upTo(0.5))} % in the first half. ` +
        "Above the template of 1.5 begins collapse, below that of 0.8 dilution.",
      head: ["directions", "share of the directions", "share of the variance"],
      rows: kept.map((place) => [which.spectra.directions[width][place], short(places[place]), short(sums[place])]),
    };
  };

  // ——— runs against each other

  const comparison = () => {
    const measure = at("measure").value, of = at("compared-layer").value;
    const lines = data.runs.map((which) => (of === "" ? overLayers(which, measure) : series(which, measure, Number(of))));
    const what = of === "" ? "median layer" : "layer " + of;
    const ends = data.runs.map((which, place) => {
      const last = lines[place].findLastIndex((value) => value !== null);
      return which.id + (last < 0 ? " was not recorded" : ` ${short(lines[place][last])} at step ${which.steps[last]}`);
    });
    const linear = measure === "spectral_concentration" || measure === "power_law_alpha";
    const rows = [...new Set(data.runs.flatMap((which) => few(which.steps.length, 12).map((column) => which.steps[column])))].sort((a, b) => a - b);
    return {
      traces: data.runs.map((which, place) => line(which.id, which.steps, lines[place], place)),
      layout: layout(`${NAMES[measure]}, ${what}`, axis("step"), linear ? axis("") : plainLog("", lines), below),
      caption: `The ${NAMES[measure]} of the ${what} ends at: ${ends.join("; ")}.`,
      head: ["step", ...data.runs.map((which) => which.id)],
      rows: rows.map((step) => [step, ...data.runs.map((which, place) => short(lines[place][which.steps.indexOf(step)]))]),
    };
  };

  const widths = () => {
    const kinds = [["soft_rank", "square"], ["effective_dimension", "diamond"], ["hard_rank", "circle"]];
    const traces = [], words = [], rows = [];
    const all = [...new Set(data.widths.hard_rank.points.map((point) => point[1]))].sort((a, b) => a - b);
    kinds.forEach(([rank, symbol], place) => {
      const { points, law } = data.widths[rank];
      const slope = law ? `β ${short(law.beta)} ± ${short(law.beta_ci95)}` : "";
      if (law) words.push(`${NAMES[rank]} ${slope} (R² ${short(law.r2)})`);
      traces.push(line(NAMES[rank] + (law ? ": " + slope : ""), points.map((point) => point[1]), points.map((point) => point[2]), place, {
        mode: "markers", marker: { symbol, size: 9, color: colour(place) }, text: points.map((point) => plain(point[0])),
        error_y: { type: "data", symmetric: false, array: points.map((point) => point[4] - point[2]), arrayminus: points.map((point) => point[2] - point[3]), color: colour(place), thickness: 1.2 },
        hovertemplate: "%{text}<br>width %{x}: %{y:.4g}<extra>" + NAMES[rank] + "</extra>",
      }));
      if (law) traces.push(line("fit", all, all.map((width) => Math.exp(law.intercept) * width ** law.beta), place, { ...thin(place, "dash"), showlegend: false, hoverinfo: "skip", hovertemplate: undefined }));
      points.forEach(([id, width, middle, lower, upper]) => rows.push([id, width, NAMES[rank], short(middle), short(lower), short(upper)]));
    });
    return {
      traces, layout: layout("", axis("width", { type: "log", tickvals: all, ticktext: all.map(String) }), plainLog("rank, median of the layers", Object.values(data.widths).map((one) => one.points.flatMap((point) => point.slice(2)))), { ...below, margin: { l: 52, r: 12, t: 12, b: 44 } }),
      caption: (words.length ? `Slopes of log rank on log width: ${words.join(", ")}; intervals are 95 %, Student's t. β near 1: new width is used; well below 1: it is not.` : "Runs of three widths or more make a law.") +
        " Bars are the quartiles of the layers.",
      head: ["run", "width", "rank", "median of the layers", "lower quartile", "upper quartile"], rows,
    };
  };

  // ——— before and after the nonlinearity

  const divergence = () => {
    const most = known((run().cells.js_divergence ?? []).flat()).reduce((a, b) => Math.max(a, b), 0);
    const high = MARKS([1, 2, 5]).find((mark) => mark >= Math.max(most, 0.01));
    const ticks = [0, 0.2, 0.4, 0.6, 0.8, 1].map((part) => part * high);
    return heatmap(run(), "js_divergence", "Jensen–Shannon divergence", "nats, ln 2 at most", "Cividis", false, { low: 0, high, ticks });
  };
  const sites = () => {
    const which = run(), step = steps()[chosen.step];
    const pairs = which.layers.map((layer) => [layer, spectrumAt(which.pre, layer, step), spectrumAt(which.spectra, layer, step)]).filter(([, pre, post]) => pre && post);
    const values = pairs.map(([layer, pre, post]) => [layer, pre[3], post[3], pre[1][0], post[1][0]]);
    const x = axis("layer", { dtick: Math.max(1, Math.ceil(which.layers.length / 16)) });
    return {
      traces: [line("before", values.map((one) => one[0]), values.map((one) => one[1]), 3, { mode: "lines+markers" }), line("after", values.map((one) => one[0]), values.map((one) => one[2]), 0, { mode: "lines+markers" })],
      layout: layout(`Power-law α before and after, step ${step}`, x, axis("α"), below),
      caption: values.length ? `At step ${step} the median α goes from ${short(median(values.map((one) => one[1])))} before the nonlinearity to ${short(median(values.map((one) => one[2])))} after it.` : `No pair of spectra at step ${step}.`,
      head: ["layer", "α before", "α after", "first direction before", "first direction after"],
      rows: values.map(([layer, ...rest]) => [layer, ...rest.map(short)]),
    };
  };

  // ——— data quality

  const complete = () => {
    const which = run();
    const kinds = [["complete", COMPLETE, 5], ["incomplete", INCOMPLETE, 4], ["not finite", NOT_FINITE, 1], ["no record", MISSING, 3]];
    const counts = kinds.map(([, flag]) => which.steps.map((_, column) => which.quality.filter((flags) => flags[column] === flag).length));
    const total = counts.map((values) => values.reduce((a, b) => a + b, 0));
    return {
      traces: kinds.map(([name, , place], index) => ({ type: "bar", name, x: which.steps, y: counts[index], marker: { color: colour(place), line: { width: 0 } }, visible: total[index] > 0 || index === 0, showlegend: true })),
      layout: layout("Layers by state of their record", axis("step"), axis("layers"), { barmode: "stack", bargap: 0.05, ...below }),
      caption: `Of the cells shown, ${kinds.map(([name], index) => `${total[index]} are ${name === "no record" ? "without a record" : name}`).filter((_, index) => total[index] || !index).join(", ")}.`,
      head: ["step", ...kinds.map(([name]) => name)],
      rows: few(which.steps.length, 16).map((column) => [which.steps[column], ...counts.map((values) => values[column])]),
    };
  };
  const tokens = () => {
    const which = run(), values = series(which, "tokens_per_width", chosen.layer);
    const ends = [which.steps[0], which.steps.at(-1)];
    return {
      traces: [line("layer " + chosen.layer, which.steps, values, 0), line("2 tokens a direction", ends, [2, 2], 1, { ...thin(1, "dash"), mode: "lines", hoverinfo: "skip", hovertemplate: undefined })],
      layout: layout("Tokens per width", axis("step"), plainLog("", [values, [2]]), below),
      caption: `Layer ${chosen.layer} was measured on ${short(median(values))} tokens per direction, by the median; below 2 a soft rank cannot be corrected.`,
      head: ["step", "tokens per width"],
      rows: few(which.steps.length, 16).map((column) => [which.steps[column], short(values[column])]),
    };
  };
  const corrected = () => {
    const which = run();
    const names = ["soft_rank", "soft_rank_corrected", "hard_rank", "hard_rank_corrected"];
    const values = names.map((name) => series(which, name, chosen.layer));
    const bias = (raw, better) => {
      const ratios = known(values[raw].map((value, column) => (value && values[better][column] ? value / values[better][column] : null)));
      return ratios.length ? short(100 * median(ratios)) + " %" : "an unknown part";
    };
    return {
      traces: names.map((name, place) => line(name.replaceAll("_", " "), which.steps, values[place], place >> 1, place % 2 ? { line: { color: colour(place >> 1), width: 2, dash: "dash" } } : {})),
      layout: layout(`Raw and corrected ranks, layer ${chosen.layer}`, axis("step"), plainLog("", values), below),
      caption: `In layer ${chosen.layer} the raw hard rank is ${bias(2, 3)} of the one corrected for few tokens, the raw soft rank ${bias(0, 1)}, by the median.`,
      head: ["step", ...names.map((name) => name.replaceAll("_", " "))],
      rows: few(which.steps.length, 16).map((column) => [which.steps[column], ...values.map((one) => short(one[column]))]),
    };
  };

  // ——— showing

  const utilization = (name, title) => () => heatmap(run(), name, title, "share of the width, log", "Viridis", true);
  const figures = {
    hard: utilization("hard_utilization", "Hard utilization"),
    soft: utilization("soft_utilization", "Soft utilization"),
    concentration: () => heatmap(run(), "spectral_concentration", "Spectral concentration", "0: flat, 1: one direction", MAGMA, false),
    spectrum, cumulative, comparison, widths, divergence, sites, complete, tokens, corrected,
  };
  const HEATMAPS = ["hard", "soft", "concentration", "divergence"];
  const OF_RUN = ["hard", "soft", "concentration", "divergence", "complete"];
  const OF_LAYER = ["spectrum", "cumulative", "tokens", "corrected"];
  const OF_STEP = ["spectrum", "cumulative", "sites"];
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]], displayModeBar: "hover" };

  const draw = (id) => {
    const figure = at(id);
    if (!figure) return;
    const shown = figures[id]();
    const plot = figure.querySelector(".plot");
    Plotly.react(plot, shown.traces, shown.layout, config);
    figure.querySelector("figcaption").textContent = shown.caption;
    fill(figure.querySelector("table"), shown.head, shown.rows);
    if (HEATMAPS.includes(id) && !plot.dataset.clicks) {
      plot.dataset.clicks = "yes";
      plot.on("plotly_click", ({ points: [point] }) => choose(point));
    }
  };
  const fill = (table, head, rows) => {
    const cells = (values, name) => {
      const line = document.createElement("tr");
      values.forEach((value) => { const cell = document.createElement(name); cell.textContent = value; line.append(cell); });
      return line;
    };
    const top = document.createElement("thead"), body = document.createElement("tbody");
    top.append(cells(head, "th"));
    rows.forEach((values) => body.append(cells(values, "td")));
    table.replaceChildren(top, body);
  };
  const all = () => Object.keys(figures).forEach(draw);
  const several = (...lists) => new Set(lists.flat()).forEach(draw);
  const moveFrames = () => HEATMAPS.filter(at).forEach((id) => Plotly.relayout(at(id).querySelector(".plot"), { shapes: frame() }));

  // ——— choosing

  const option = (value, text) => { const one = document.createElement("option"); one.value = value; one.textContent = text; return one; };
  const setRun = (place) => {
    chosen.run = place;
    if (!run().layers.includes(chosen.layer)) chosen.layer = run().worst;
    at("layer").replaceChildren(...run().layers.map((layer) => option(layer, layer)));
    at("layer").value = chosen.layer;
    at("step").max = steps().length - 1;
    setStep(steps().length - 1);
  };
  const setStep = (place) => {
    chosen.step = place;
    at("step").value = place;
    at("step").setAttribute("aria-valuetext", "step " + steps()[place]);
    at("step-shown").textContent = steps()[place];
  };
  const nearest = (step) => steps().reduce((best, one, place) => (Math.abs(one - step) < Math.abs(steps()[best] - step) ? place : best), 0);
  const choose = (point) => {
    chosen.layer = run().layers[Math.round(point.y)];
    at("layer").value = chosen.layer;
    setStep(nearest(point.x));
    several(OF_LAYER, OF_STEP);
    moveFrames();
  };
  let waiting = false;
  at("step").addEventListener("input", () => {
    setStep(Number(at("step").value));
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; several(OF_STEP); moveFrames(); });
  });
  at("layer").addEventListener("change", () => { chosen.layer = Number(at("layer").value); several(OF_LAYER); moveFrames(); });
  at("run").addEventListener("change", () => { setRun(Number(at("run").value)); several(OF_RUN, OF_LAYER, OF_STEP); });
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  if (at("measure")) {
    const layers = [...new Set(data.runs.flatMap((which) => which.layers))].sort((a, b) => a - b);
    at("compared-layer").append(...layers.map((layer) => option(layer, "layer " + layer)));
    ["measure", "compared-layer"].forEach((id) => at(id).addEventListener("change", () => draw("comparison")));
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (isDark) => {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    at("theme").setAttribute("aria-pressed", String(isDark));
  };
  at("theme").addEventListener("click", () => { setTheme(document.documentElement.dataset.theme !== "dark"); all(); });
  dark.addEventListener("change", () => { setTheme(dark.matches); all(); });

  setTheme(dark.matches);
  chosen.layer = run().worst;
  setRun(0);
  all();
  document.documentElement.dataset.ready = "yes";
})();
