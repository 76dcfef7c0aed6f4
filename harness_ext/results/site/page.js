"use strict";
(() => {
  const ROWS = 50; // of a page of the table
  const MOST = 12; // runs in one figure, past which nobody tells them apart
  const WORDS = {
    hard_limit: "limit", out_of_memory: "memory", backend_limit: "backend", backend_error: "error", interrupted: "stopped", too_short: "too short",
  };
  const SIZES = [["any", 0, Infinity], ["below 100 M", 0, 1e8], ["100 M to 1 B", 1e8, 1e9], ["1 B to 10 B", 1e9, 1e10],
    ["10 B and more", 1e10, Infinity]];

  // ------------------------------------------------------------------ data: scripts that hand it over, since fetch fails on file://

  const held = new Map(), asked = new Map();
  window.register = (key, text) => held.set(key, JSON.parse(text));

  function script(path) {
    if (!asked.has(path)) {
      asked.set(path, new Promise((done, failed) => {
        const tag = document.createElement("script");
        tag.src = path;
        tag.onload = done;
        tag.onerror = () => { asked.delete(path); failed(new Error(`${path} could not be loaded`)); };
        document.head.append(tag);
      }));
    }
    return asked.get(path);
  }

  async function load(key) {
    if (!held.has(key)) await script(`data/${key}.js`);
    return held.get(key);
  }

  async function loadVega() {
    if (!window.vegaEmbed) await script("vega.js");
    return load("charts");
  }

  // ------------------------------------------------------------------ what is shown

  const $ = (id) => document.getElementById(id);
  const board = { task: 0, rule: "nolima", sort: "reach", down: true, page: 0, picked: new Map(), open: new Map() };
  let index, scores, lengths, found = [];

  /** An element. Text from records comes in as a child, so as text. */
  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "rect", "line", "circle", "title"].includes(tag);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const whole = (number) => number.toLocaleString("en");
  const times = (number) => `${Number(number.toPrecision(3))}×`;
  const percent = (share) => (100 * share).toFixed(1);
  const short = (number) => number >= 1e9 ? `${Number((number / 1e9).toPrecision(3))} B`
    : number >= 1e6 ? `${Number((number / 1e6).toPrecision(3))} M` : whole(number);
  const isLoss = () => index.tasks[board.task].metric === "loss";
  const say = (score, metric) => metric === "loss" ? score.toFixed(3) : percent(score);
  const words = (outcome) => outcome.replaceAll("_", " ");
  const named = (column, row) => column.values[column.rows[row]];

  // ------------------------------------------------------------------ columns

  function scoreAt(row, multiple) {
    const place = named(scores.grid, row).indexOf(multiple);
    return place < 0 ? undefined : scores.scores[row][place];
  }

  function listColumns() {
    const rows = index.rows;
    const columns = [{ key: "model", title: "Model and override", value: (row) => rows.model[row], cell: modelCell, kind: "model", rowHeader: true }];
    if (!isLoss()) {
      columns.push(
        { key: "effective", title: "Effective length", value: (row) => lengths.tokens[row], cell: (row) => lengthCell(row, whole, 1), down: true },
        { key: "reach", title: "× trained", value: (row) => lengths.tokens[row] && rows.trained[row] ? lengths.tokens[row] / rows.trained[row] : null,
          cell: (row) => lengthCell(row, times, rows.trained[row]), down: true });
    }
    columns.push({ key: "curve", title: "Curve", cell: curveCell, kind: "text" });
    scores.columns.forEach((multiple, place) => columns.push({
      key: `at-${multiple}`, title: times(multiple), down: !isLoss(), kind: place ? "" : "group",
      value: (row) => { const score = scoreAt(row, multiple); return typeof score === "number" ? score : null; },
      cell: (row) => scoreCell(scoreAt(row, multiple)),
    }));
    columns.push(
      { key: "scheme", title: "Scheme", value: (row) => named(rows.scheme, row), cell: (row) => plainCell(named(rows.scheme, row)), kind: "text group" },
      { key: "method", title: "Method", value: (row) => named(rows.method, row), cell: (row) => plainCell(named(rows.method, row)), kind: "text" },
      { key: "size", title: "Parameters", value: (row) => rows.parameters[row], down: true,
        cell: (row) => plainCell(rows.parameters[row] === null ? null : short(rows.parameters[row])) },
      { key: "trained", title: "Trained length", value: (row) => rows.trained[row], down: true,
        cell: (row) => plainCell(rows.trained[row] === null ? null : whole(rows.trained[row]) + (isStated(row) ? " †" : "")) });
    return columns;
  }

  const isStated = (row) => index.rows.stated.includes(row);
  const plainCell = (text) => text === null ? { text: "·", kind: "none", label: "unknown" } : { text };

  function modelCell(row) {
    const rows = index.rows, run = scores.run[row];
    const name = `${rows.model[row]}, ${named(rows.override, row)}`;
    const pick = make("input", { type: "checkbox", "aria-label": `Pick ${name}`, "data-run": run,
      onchange: (event) => pickRun(run, name, event.target) });
    pick.checked = board.picked.has(run);
    const toggle = make("button", { type: "button", "aria-expanded": String(board.open.has(run)), "aria-label": `Figures of ${name}`,
      "data-open": run, onclick: (event) => toggleRow(run, event.currentTarget) });
    const telling = [rows.dtype, rows.platform].filter((column) => column.values.length > 1).map((column) => named(column, row));
    const more = [named(rows.override, row), ...telling].filter(Boolean).join(" · ");
    return { node: make("div", { class: "named" }, pick, toggle, make("div", {}, make("strong", {}, rows.model[row]), make("small", {}, more))) };
  }

  function lengthCell(row, format, unit) {
    const outcome = named(lengths.outcome, row);
    if (!outcome) return { text: "·", kind: "none", label: "not computed" };
    if (outcome === "not_measurable") return { text: "n. m.", kind: "unrun", label: "not measurable" };
    if (!unit) return { text: "·", kind: "none", label: "trained length unknown" };
    const [tokens, lower, upper] = [lengths.tokens[row], lengths.lower[row], lengths.upper[row]].map((t) => t === null ? null : t / unit);
    const more = outcome === "at_least";
    const interval = upper === null ? "no interval" : `${lower ? format(lower) : "none"} to ${format(upper)}${more ? " or more" : ""}`;
    return { node: document.createTextNode((more ? "≥ " : "") + format(tokens)), below: interval };
  }

  function scoreCell(score) {
    if (score === undefined) return { text: "·", kind: "none", label: "not asked for" };
    if (typeof score === "string") return { text: WORDS[score] ?? words(score), kind: "unrun", label: `could not be run: ${words(score)}` };
    return { text: say(score, index.tasks[board.task].metric), kind: isLoss() ? "" : "score", share: score };
  }

  function curveCell(row) {
    const grid = named(scores.grid, row), points = scores.scores[row];
    if (!grid.length) return { text: "·", kind: "none", label: "no multiples" };
    const all = [...scores.columns, 1], [first, last] = [Math.log2(Math.min(...all)), Math.log2(Math.max(...all))];
    const x = (multiple) => 3 + 98 * Math.min(1, Math.max(0, (Math.log2(multiple) - first) / (last - first || 1)));
    const [top, bottom] = isLoss() ? lossRange() : [1, 0];
    const y = (score) => 9 + 20 * Math.min(1, Math.max(0, (top - score) / (top - bottom || 1)));
    let path = "", pen = "M";
    const marks = [];
    grid.forEach((multiple, place) => {
      const score = points[place], left = x(multiple);
      if (typeof score !== "number") {
        pen = "M";
        marks.push(make("path", { class: "cross", d: `M${left - 2.5},1.5l5,5m0,-5l-5,5` }));
        return;
      }
      path += `${pen}${left.toFixed(1)},${y(score).toFixed(1)}`;
      pen = "L";
      marks.push(make("circle", { class: "dot", cx: left.toFixed(1), cy: y(score).toFixed(1), r: 1.9 }));
    });
    const said = grid.map((multiple, place) => `${times(multiple)} ${typeof points[place] === "number" ? say(points[place], index.tasks[board.task].metric) : words(points[place])}`);
    return { node: make("svg", { class: "spark", viewBox: "0 0 104 32", role: "img", "aria-label": `Scores: ${said.join(", ")}` },
      make("rect", { class: "past", x: x(1), y: 0, width: 104 - x(1), height: 32 }),
      make("line", { class: "trained", x1: x(1), x2: x(1), y1: 0, y2: 32 }), make("path", { class: "line", d: path }), ...marks) };
  }

  function lossRange() {
    if (!scores.range) {
      const all = scores.scores.flat().filter((score) => typeof score === "number").sort((a, b) => a - b);
      scores.range = [all[0] ?? 0, all[Math.floor(0.95 * (all.length - 1))] ?? 1];
    }
    return [scores.range[1], scores.range[0]];
  }

  // ------------------------------------------------------------------ the table

  let columns = [];

  function drawHead() {
    columns = listColumns();
    if (!columns.some((column) => column.key === board.sort)) Object.assign(board, { sort: "model", down: false });
    const heads = columns.map((column) => make("th", { scope: "col", class: column.kind, "data-key": column.key },
      column.value ? make("button", { type: "button", onclick: () => sortBy(column) }, column.title) : make("span", {}, column.title)));
    document.querySelector("#rows thead").replaceChildren(make("tr", {}, ...heads));
    $("caption").textContent = `Models and overrides on ${index.tasks[board.task].name}`;
  }

  function sortBy(column) {
    board.down = board.sort === column.key ? !board.down : Boolean(column.down);
    board.sort = column.key;
    board.page = 0;
    arrange();
  }

  function arrange() {
    const rows = index.rows, asked = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [scheme, method] = [$("scheme").value, $("method").value].map((value) => value === "" ? null : Number(value));
    const [, least, most] = SIZES[$("size").value];
    const anySize = Number($("size").value) === 0;
    found = [];
    for (let row = 0; row < rows.model.length; row++) {
      if (scores.run[row] === null) continue;
      if (scheme !== null && rows.scheme.rows[row] !== scheme) continue;
      if (method !== null && rows.method.rows[row] !== method) continue;
      const size = rows.parameters[row];
      if (!anySize && (size === null || size < least || size >= most)) continue;
      if (asked.length) {
        const text = `${rows.model[row]} ${named(rows.override, row)} ${named(rows.scheme, row)} ${named(rows.dtype, row)} ${named(rows.platform, row)}`.toLowerCase();
        if (!asked.every((word) => text.includes(word))) continue;
      }
      found.push(row);
    }
    const { value } = columns.find((column) => column.key === board.sort);
    const values = new Map(found.map((row) => [row, value(row)]));
    const sign = board.down ? -1 : 1;
    found.sort((a, b) => {
      const [one, other] = [values.get(a), values.get(b)];
      if (one === other) return a - b;
      if (one === null) return 1; // what has no value stands last, whichever way
      if (other === null) return -1;
      return sign * (one < other ? -1 : 1);
    });
    for (const head of document.querySelectorAll("#rows thead th")) {
      if (head.dataset.key === board.sort) head.setAttribute("aria-sort", board.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    drawRows();
  }

  function drawRows() {
    const pages = Math.max(1, Math.ceil(found.length / ROWS));
    board.page = Math.min(board.page, pages - 1);
    const start = board.page * ROWS, shown = found.slice(start, start + ROWS);
    const body = document.querySelector("#rows tbody");
    body.replaceChildren(...shown.flatMap((row) => {
      const line = make("tr", { class: "row" }, ...columns.map((column) => drawCell(column, row)));
      const open = board.open.get(scores.run[row]);
      return open ? [line, open] : [line];
    }));
    const total = index.tasks[board.task].rows;
    $("count").textContent = found.length === total ? `${whole(total)} ${total === 1 ? "row" : "rows"}` : `${whole(found.length)} of ${whole(total)} rows`;
    $("place").textContent = found.length ? `${whole(start + 1)} to ${whole(start + shown.length)}` : "none";
    $("back").disabled = board.page === 0;
    $("on").disabled = board.page >= pages - 1;
    document.querySelector(".pager").hidden = pages === 1;
    document.body.dataset.ready = "true";
  }

  function drawCell(column, row) {
    const cell = column.cell(row);
    const kinds = [column.kind, cell.kind].filter(Boolean).join(" ");
    const element = make(column.rowHeader ? "th" : "td", { class: kinds || null, scope: column.rowHeader ? "row" : null, title: cell.label },
      cell.node ?? cell.text, cell.label ? make("span", { class: "hidden" }, ` ${cell.label}`) : null, cell.below ? make("small", {}, cell.below) : null);
    if (cell.kind === "score") element.style.setProperty("--share", cell.share);
    return element;
  }

  // ------------------------------------------------------------------ a run's figures

  const toRows = (table, extra) => Object.keys(table).length === 0 ? []
    : table[Object.keys(table)[0]].map((_, place) => ({ ...Object.fromEntries(Object.entries(table).map(([name, column]) => [name, column[place]])), ...extra }));
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const drawn = new Map(); // element → what draws it again, in other colours

  async function drawChart(place, name, { series, ...data }) {
    const { specs, themes } = await loadVega();
    const draw = async () => {
      const theme = themes[dark() ? "dark" : "light"];
      const points = data.points ?? [];
      const places = [...new Set(name.endsWith("multiple") ? [1, ...points.map((point) => point.multiple)] : points.map((point) => point.length ?? 0))];
      const params = [...theme.params, { name: "series", value: series ?? [...new Set(points.map((point) => point.series))] }, { name: "places", value: places.sort((a, b) => a - b) }];
      const spec = { ...specs[name], ...theme, params, datasets: data };
      if (data.cells) spec.height *= new Set(data.cells.map((cell) => cell.depth)).size;
      const options = { actions: false, ast: true, renderer: "svg", defaultStyle: false, logLevel: 1, tooltip: { disableDefaultStyle: true } };
      await window.vegaEmbed(place, spec, options);
    };
    drawn.set(place, draw);
    await draw();
  }

  function redraw() {
    for (const [place, draw] of drawn) place.isConnected ? draw() : drawn.delete(place);
  }

  function sources(detail) {
    const isFile = detail.records.startsWith("records/");
    return make("span", { class: "sources" },
      isFile ? make("a", { href: detail.records }, "Records") : make("span", {}, `Records: ${detail.records}`),
      make("button", { type: "button", class: "link", onclick: (event) => copy(detail.run.command, event.currentTarget) }, "Copy command"));
  }

  async function copy(text, button) {
    const area = make("textarea", { class: "hidden", "aria-hidden": "true" });
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page opened from disk may not use the clipboard
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const before = button.dataset.says ??= button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  }

  function figure(title, label, name, data, from) {
    const chart = make("div", { class: "chart", role: "img", "aria-label": label });
    const whole = make("figure", {}, make("figcaption", {}, make("span", {}, title), from ?? ""), chart);
    queueMicrotask(() => drawChart(chart, name, data).catch((error) => chart.replaceChildren(make("p", { class: "error" }, String(error.message)))));
    return whole;
  }

  /** The figures of one or more runs on the task that is chosen. */
  function drawFigures(details) {
    const name = index.tasks[board.task].name;
    const runs = details.filter((detail) => Object.hasOwn(detail.tasks, name));
    const points = runs.flatMap((detail, order) => toRows(detail.tasks[name].points, { series: detail.label, order }));
    const controls = runs.length === 1 ? toRows(runs[0].tasks[name].controls) : [];
    const field = points.every((point) => point.multiple !== null) ? "multiple" : "length";
    const kind = isLoss() ? "loss" : controls.length ? "controls" : "exact";
    const title = isLoss() ? "Loss by position" : runs.length > 1 ? "Score against length" : "Score against length, with its controls";
    const figures = points.length === 0 ? [] : [figure(controls.length || runs.length > 1 || isLoss() ? title : "Score against length",
      `${title}: ${runs.map((detail) => detail.label).join(", ")}. The numbers are in the table below.`,
      `${kind}-${field}`, { points, ...(controls.length ? { controls } : {}) }, runs.length === 1 ? sources(runs[0]) : null)];
    for (const detail of runs) {
      const why = detail.tasks[name].why;
      if (!why) continue;
      const arms = toRows(why.arms), series = [...new Set(arms.filter((arm) => arm.score !== null && arm.arm !== "predicted").map((arm) => arm.series))];
      figures.push(figure(runs.length > 1 ? `Why: ${detail.label}` : "Why it falls: the same needles, one thing changed",
        `Arms of the experiment: ${detail.label}. ${why.sentence}. The numbers are in the tables below.`, "arms-multiple", { points: arms, series }, sources(detail)));
    }
    for (const detail of runs) {
      const cells = toRows(detail.tasks[name].cells);
      if (!cells.length) continue;
      figures.push(figure(runs.length > 1 ? detail.label : "Score by depth and length", `Depth against length: ${detail.label}`, "heat", { cells }, sources(detail)));
    }
    const depths = runs.flatMap((detail) => toRows(detail.tasks[name].profile, { series: detail.label })), series = runs.map((detail) => detail.label);
    const pasts = runs.map((detail) => toRows(detail.tasks[name].points).filter((point) => point.multiple > 1 && point.score !== null).map((point) => point.multiple).join());
    if (depths.length && new Set(pasts.filter(Boolean)).size === 1) { // over other lengths it would be another score
      figures.push(figure("Score by depth past 1×", `Score against depth, all lengths past the trained length together: ${series.join(", ")}`,
        "profile", { points: depths, series }, runs.length === 1 ? sources(runs[0]) : null));
    }
    return make("div", { class: runs.length > 1 ? "figures many" : "figures" }, ...figures);
  }

  function table(caption, heads, rows) {
    return make("div", { class: "wide" }, make("table", { class: "numbers" }, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...rows.map(([first, ...rest]) => make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((text) => text instanceof Element ? text : make("td", {}, text)))))));
  }

  function interval(low, high, format) {
    if (low === null) return "no interval";
    return high === null ? `${format(low)} or more` : `${format(low)} to ${format(high)}`;
  }

  function numbers(task) {
    const format = (score) => say(score, task.metric);
    const controls = toRows(task.controls), beside = [...new Set(controls.filter((control) => control.length !== null).map((control) => control.control))];
    const at = (name, length) => controls.find((control) => control.control === name && control.length === length);
    const spread = (point) => point?.score === null || point === undefined ? "·" : cell(format(point.score), interval(point.low, point.high, format));
    const rows = toRows(task.points).map((point) => [whole(point.length), point.multiple === null ? "·" : times(point.multiple),
      point.score === null ? cell(words(point.outcome), point.reason, "unrun") : spread(point), point.score === null ? "" : whole(point.n),
      ...beside.map((name) => spread(at(name, point.length)))]);
    for (const alone of controls.filter((control) => control.length === null)) rows.push([alone.control, "", spread(alone), whole(alone.n), ...beside.map(() => "")]);
    return table("Scores, with 95 % intervals", ["tokens", "× trained", task.metric === "loss" ? "loss" : "exact, %", "prompts", ...beside], rows);
  }

  /** What arms say of why a score falls: a sentence, what each cause takes, the arms' scores, and why some were not run. */
  function reasons(why) {
    const arms = toRows(why.arms), multiples = [...new Set(arms.filter((arm) => arm.arm !== "predicted").map((arm) => arm.multiple))].sort((a, b) => a - b);
    const heads = [...new Set(why.causes.flatMap((row) => row.effects.map((effect) => effect.cause)))];
    const point = (share) => String(Math.round(100 * share) || 0); // not -0
    const points = (found) => found ? cell(point(found.value), found.lower === 0 && found.upper === 0 ? "by construction" : interval(found.lower, found.upper, point)) : "·";
    const orders = (row) => row.effects.map((found) => `${found.cause} ${point(found.least)} to ${point(found.most)}`).join(", ");
    const score = (found) => found === undefined ? "·" : found.score === null ? cell(words(found.outcome), "", "unrun") : cell(percent(found.score), interval(found.low, found.high, percent));
    const told = why.causes.filter((row) => row.effects.length), predicted = arms.filter((arm) => arm.arm === "predicted");
    const notes = [...why.reasons, why.baselines,
      ...why.left_out.map((left) => `Left out: ${left.arms.join(", ")} at ${left.multiples.map(times).join(", ")}, ${words(left.outcome)}: ${left.reason}`)].filter(Boolean);
    return make("div", { class: "why" }, make("h3", {}, "Why it falls"), why.sentence ? make("p", { class: "sentence" }, why.sentence) : null,
      told.length ? table("Points lost against the trained length, and to what, with 95 % intervals", ["at", "lost", ...heads, "by order"],
        told.map((row) => [times(row.multiple), points(row.lost), ...heads.map((head) => points(row.effects.find((found) => found.cause === head))), cell(orders(row), "", "words")])) : null,
      table("The arms, exact in percent, with 95 % intervals", ["arm", ...multiples.map(times)],
        [...new Set(arms.filter((arm) => arm.arm !== "predicted").map((arm) => arm.arm))].map((name) => [arms.find((arm) => arm.arm === name).series,
          ...multiples.map((multiple) => score(arms.find((arm) => arm.arm === name && arm.multiple === multiple)))])),
      predicted.length ? table("Predicted, not measured", ["at", "exact, %", "from"], predicted.map((one) => [times(one.multiple), score(one), cell(one.reason, "", "words")])) : null,
      ...notes.map((note) => make("p", { class: "reading" }, note)));
  }

  const cell = (text, below, kind) => make("td", { class: kind }, text, below ? make("small", {}, below) : null);

  function reaches(task) {
    const rows = task.effective_lengths.map((found) => [index.rules[found.rule] ?? found.rule,
      found.tokens === null ? "not measurable" : `${found.outcome === "at_least" ? "≥ " : ""}${whole(found.tokens)}`,
      found.tokens === null ? cell(found.reason, "", "words") : interval(found.lower, found.upper, (tokens) => tokens ? whole(tokens) : "none") + (found.outcome === "at_least" && found.upper !== null ? " or more" : "")]);
    const derived = [["Half of the in-window score is left at", task.half_length, times], ["Mean score past the trained length (over log₂)", task.area_past, percent]];
    for (const [name, value, format] of derived) {
      if (value.value !== null) rows.push([name, format(value.value), interval(value.lower, value.upper, format)]);
      else rows.push([name, value.lower === null ? "none" : `none below ${format(value.lower)}`, cell(value.reason, "", "words")]);
    }
    return table("Effective length, by every rule", ["rule", "tokens", "95 %"], rows);
  }

  function facts(detail, task) {
    const run = detail.run, model = run.model_info, trained = run.trained_length;
    const options = Object.entries(run.override.options).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`);
    const pairs = [
      ["Model", model.id], ["Revision", model.revision], ["Weights", model.weights_fingerprint.slice(0, 16)],
      ["Loaded as", [model.dtype, model.inference_platform].filter(Boolean).join(", ")], ["Family", [model.model_type, model.position_scheme].filter(Boolean).join(", ")],
      ["Trained length", trained === null ? "unknown" : `${whole(trained.tokens)} (${trained.source}${trained.config_tokens !== null && trained.config_tokens !== trained.tokens ? `; the config says ${whole(trained.config_tokens)}` : ""})`],
      ["Evidence", trained?.config_tokens !== trained?.tokens ? trained?.evidence : ""], ["Positions end at", model.hard_limit === null ? "" : whole(model.hard_limit)],
      ["Override", [detail.label.split(" · ").pop(), ...options].join(", ")], ["Override's fingerprint", run.override.fingerprint.slice(0, 16)],
      ["Prompts", `${task.samples} samples, seed ${task.seed}, task version ${task.version}, ${task.output_type}`], ["Prompts' fingerprint", task.prompts_fingerprint.slice(0, 16)],
      ["Run by", [run.source_metadata.source_organization_name, run.source_metadata.evaluator_relationship.replaceAll("_", " ")].filter(Boolean).join(", ")],
      ["Run on", [run.evaluation_timestamp, run.hardware && [run.hardware.count > 1 ? `${run.hardware.count} ×` : "", run.hardware.name || run.hardware.device].filter(Boolean).join(" ")].filter(Boolean).join(", ")],
      ["Took", run.wall_seconds === null ? "" : `${whole(Math.round(run.wall_seconds))} s${run.compute_seconds === null ? "" : `, ${whole(Math.round(run.compute_seconds))} s in the model`}`],
      ["Tokens", run.tokens_asked === null ? "" : `${whole(run.tokens_asked)} asked${run.tokens_computed === null ? "" : `, ${whole(run.tokens_computed)} computed`}`],
      ["With", [`${run.eval_library.name} ${run.eval_library.version}`, ...Object.entries(run.packages).filter(([name]) => name !== run.eval_library.name).map(([name, version]) => `${name} ${version}`)].join(", ")],
    ];
    return make("div", {}, make("h3", {}, "The run"), make("dl", {}, ...pairs.filter(([, value]) => value).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
  }

  function command(detail) {
    return make("div", { class: "command" }, make("code", {}, detail.run.command || "not recorded"),
      make("button", { type: "button", onclick: (event) => copy(detail.run.command, event.currentTarget) }, "Copy"));
  }

  function drawDetail(detail) {
    const task = detail.tasks[index.tasks[board.task].name];
    return [drawFigures([detail]), task.why ? reasons(task.why) : null, make("div", { class: "facts" }, numbers(task), task.effective_lengths.length ? reaches(task) : null),
    make("h3", {}, "The command that repeats it"), command(detail), facts(detail, task)].filter(Boolean);
  }

  async function toggleRow(run, button) {
    if (board.open.has(run)) {
      board.open.get(run).remove();
      board.open.delete(run);
      button.setAttribute("aria-expanded", "false");
      return;
    }
    const inside = make("div", { class: "inside" }, make("p", {}, "Loading…"));
    const row = make("tr", { class: "opened" }, make("td", { class: "detail", colspan: columns.length }, inside));
    board.open.set(run, row);
    button.setAttribute("aria-expanded", "true");
    button.closest("tr").after(row);
    await fillDetail(run, inside);
  }

  async function fillDetail(run, inside) {
    try {
      inside.replaceChildren(...drawDetail(await load(`run-${run}`)));
    } catch (error) {
      inside.replaceChildren(make("p", { class: "error" }, String(error.message)));
    }
  }

  // ------------------------------------------------------------------ runs compared

  function pickRun(run, name, box) {
    if (box.checked && board.picked.size >= MOST) {
      box.checked = false;
      $("picked").textContent = `${MOST} runs is the most that one figure tells apart`;
      return;
    }
    box.checked ? board.picked.set(run, name) : board.picked.delete(run);
    drawTray();
  }

  function drawTray() {
    $("tray").hidden = board.picked.size === 0 || Boolean(index.report);
    $("picked").textContent = `${board.picked.size} ${board.picked.size === 1 ? "run" : "runs"} picked`;
    if (!$("compared").hidden) board.picked.size ? drawOverlay() : closeOverlay();
    remember();
  }

  async function drawOverlay() {
    $("compared").hidden = false;
    $("compare").hidden = true;
    try {
      const details = tellApart(await Promise.all([...board.picked.keys()].map((run) => load(`run-${run}`))));
      $("overlay").replaceChildren(drawFigures(details), compareNumbers(details), ...comparePairs(details));
    } catch (error) {
      $("overlay").replaceChildren(make("p", { class: "error" }, String(error.message)));
    }
  }

  /** Runs under names that are theirs alone: one line of a figure is one run. */
  const tellApart = (details) => details.map((detail) => details.filter((other) => other.label === detail.label).length === 1 ? detail
    : { ...detail, label: `${detail.label} (${detail.run.evaluation_id.slice(0, 8)})` });

  function compareNumbers(details) {
    const { name, metric } = index.tasks[board.task], format = (score) => say(score, metric);
    const points = details.map((detail) => Object.hasOwn(detail.tasks, name) ? toRows(detail.tasks[name].points) : []);
    const field = points.flat().every((point) => point.multiple !== null) ? "multiple" : "length", write = field === "multiple" ? times : whole;
    const places = [...new Set(points.flat().map((point) => point[field]))].sort((a, b) => a - b);
    const rows = details.map((detail, row) => [detail.label, ...places.map((place) => {
      const point = points[row].find((found) => found[field] === place);
      if (point === undefined) return "·";
      return point.score === null ? cell(words(point.outcome), "", "unrun") : cell(format(point.score), interval(point.low, point.high, format));
    }), make("td", {}, sources(detail))]);
    return table("Scores, with 95 % intervals, and where they come from", ["run", ...places.map(write), ""], rows);
  }

  // ------------------------------------------------------------------ and tested in pairs, as results/paired.py does it

  /** The two-sided p of one : other discordant prompts, each a fair coin: McNemar's exact test. */
  function mcnemar(one, other) {
    const n = one + other;
    let p = 0, log = -n * Math.LN2;
    for (let k = 0; k <= Math.min(one, other); k++) {
      p += 2 * Math.exp(log);
      log += Math.log((n - k) / (k + 1));
    }
    return Math.min(1, p);
  }

  /** The share of all choices of the differences' signs that lead as far from 0: the exact test of haystacks. */
  function flipSigns(differences) {
    let chances = Float64Array.of(1);
    for (const size of differences.map(Math.abs).filter(Boolean)) {
      const longer = new Float64Array(chances.length + 2 * size);
      chances.forEach((chance, place) => { longer[place] += chance / 2; longer[place + 2 * size] += chance / 2; });
      chances = longer;
    }
    const middle = (chances.length - 1) / 2, reached = Math.abs(differences.reduce((sum, difference) => sum + difference, 0));
    return Math.min(1, chances.reduce((p, chance, place) => Math.abs(place - middle) >= reached ? p + chance : p, 0));
  }

  /** Each p after Holm's correction for all of them. */
  function holm(values) {
    const adjusted = [];
    let highest = 0;
    values.map((value, place) => [value, place]).sort(([a], [b]) => a - b).forEach(([value, place], rank) => {
      highest = Math.max(highest, Math.min(1, (values.length - rank) * value));
      adjusted[place] = highest;
    });
    return adjusted;
  }

  /** The tests of two runs on a task, by length and as "past" over the lengths past both trained lengths; or in words why there are none. */
  function testPair(pair, name) {
    const points = pair.map((detail) => new Map(toRows(detail.tasks[name].points).map((point) => [point.length, point])));
    const prompts = pair.map((detail) => new Map(toRows(detail.tasks[name].prompts).map((asked) => [asked.length, asked])));
    const at = (length) => points.map((found) => found.get(length));
    const planned = [...points[0].keys()].filter((length) => points[1].has(length));
    for (const length of planned) {
      if (at(length).some((point) => point.outcome !== "measured") || prompts[0].get(length)?.fingerprint === prompts[1].get(length)?.fingerprint) continue;
      return { pair, refused: "they were not given the same prompts (which takes one tokenizer, one seed, one --limit and one version of the tasks)" };
    }
    const isAsked = (length) => prompts.every((found) => found.has(length));
    if (!planned.some(isAsked)) return { pair, refused: "no length was measured on both" };
    const test = (lengths) => {
      const used = lengths.filter(isAsked), haystacks = new Map(), found = { n: 0, first: 0, second: 0, lengths: used };
      for (const length of used) {
        const [ours, theirs] = prompts.map((asked) => asked.get(length));
        ours.sample.forEach((sample, place) => [...ours.exact[place]].forEach((answer, depth) => {
          const difference = Number(answer) - Number(theirs.exact[place][depth]);
          found.n += 1;
          found.first += difference > 0;
          found.second += difference < 0;
          haystacks.set(sample, (haystacks.get(sample) ?? 0) + difference);
        }));
      }
      if (used.length) return { ...found, p: mcnemar(found.first, found.second), byHaystack: flipSigns([...haystacks.values()]) };
      return { reason: [...new Set(lengths.flatMap(at).map((point) => point.outcome).filter((outcome) => outcome !== "measured"))].map(words).join(", ") || "no prompt" };
    };
    const past = planned.filter((length) => at(length).every((point) => point.multiple > 1));
    return { pair, tests: new Map([...(past.length ? [["past", test(past)]] : []), ...planned.map((length) => [length, test([length])])]) };
  }

  const chance = (p) => p < 0.0001 ? "< 0.0001" : String(Number(p.toPrecision(2)));

  function testCell(test) {
    if (test === undefined) return "·";
    if (test.reason) return cell(test.reason, "", "unrun");
    const said = `${whole(test.n)} prompts at ${test.lengths.map(whole).join(", ")} tokens; before the correction p is ${chance(test.byHaystack)}, of prompts ${chance(test.p)}`;
    return make("td", { class: test.byHaystackHolm <= 0.05 ? "sure" : null, title: said, "data-p": test.p, "data-p-holm": test.holm,
      "data-haystacks": test.byHaystack, "data-haystacks-holm": test.byHaystackHolm },
    `${test.first} : ${test.second}`, make("small", {}, `p ${chance(test.byHaystackHolm)}`), make("small", {}, `prompts ${chance(test.holm)}`));
  }

  /** A table of all pairs with its reading, and a line for each pair that is none. */
  function comparePairs(details) {
    const { name, metric } = index.tasks[board.task];
    const runs = metric === "loss" ? [] : details.filter((detail) => Object.hasOwn(detail.tasks, name));
    const found = runs.flatMap((first, place) => runs.slice(place + 1).map((second) => testPair([first, second], name)));
    const rows = found.filter((one) => one.tests), tests = rows.flatMap((row) => [...row.tests.values()]).filter((test) => !test.reason);
    holm(tests.map((test) => test.p)).forEach((p, place) => { tests[place].holm = p; });
    holm(tests.map((test) => test.byHaystack)).forEach((p, place) => { tests[place].byHaystackHolm = p; });
    const places = [...new Set(rows.flatMap((row) => [...row.tests.keys()]))].sort((a, b) => (a === "past" ? 0 : a) - (b === "past" ? 0 : b));
    const why = [...new Set(found.map((one) => one.refused).filter(Boolean))];
    const refused = why.map((reason) => make("p", { class: "reading" }, `Not compared, for ${reason}: ${found.filter((one) => one.refused === reason)
      .map(({ pair }) => `${pair[0].label} and ${pair[1].label}`).join("; ")}.`));
    if (!rows.length) return refused;
    return [table("Two runs on the same prompts", ["first : second", ...places.map((place) => place === "past" ? "past the trained length" : whole(place))],
      rows.map(({ pair, tests: own }) => [make("span", {}, `${pair[0].label}\u00a0:`, make("br"), pair[1].label), ...places.map((place) => testCell(own.get(place)))])),
    make("p", { class: "reading" }, "Prompts that only the first and that only the second answered exactly, by length in tokens. p is of the exact test of haystacks; "
      + "below it stands McNemar's of prompts, too small where haystacks differ in what is hard on them. Both are after Holm's correction over the "
      + `${tests.length} tests of this table; bold is a p of at most 0.05.`), ...refused];
  }

  function closeOverlay() {
    $("compared").hidden = true;
    $("compare").hidden = false;
    $("overlay").replaceChildren();
  }

  // ------------------------------------------------------------------ start

  function remember() {
    const parts = new URLSearchParams();
    if (board.task) parts.set("task", index.tasks[board.task].name);
    if (board.picked.size) parts.set("runs", [...board.picked.keys()].join(","));
    try { history.replaceState(null, "", `#${parts}`); } catch { /* a viewer that forbids it */ }
  }

  async function chooseTask() {
    const [task, rule] = [board.task, board.rule];
    const wanted = [load(`task-${task}`), isLoss() ? null : load(`task-${task}-${rule}`)];
    const [ofTask, ofRule] = await Promise.all(wanted);
    if (task !== board.task || rule !== board.rule) return; // somebody chose again meanwhile
    [scores, lengths] = [ofTask, ofRule];
    $("rule-label").hidden = isLoss();
    drawHead();
    arrange();
  }

  function options(select, values, first) {
    const sorted = values.map((value, place) => [place, value]).sort((a, b) => a[1] < b[1] ? -1 : 1);
    select.replaceChildren(make("option", { value: "" }, first), ...sorted.map(([place, value]) => make("option", { value: place }, value)));
  }

  async function start() {
    index = await load("index");
    $("task").replaceChildren(...index.tasks.map((task, place) => make("option", { value: place }, task.name)));
    $("rule").replaceChildren(...Object.entries(index.rules).map(([rule, says]) => make("option", { value: rule }, says)));
    options($("scheme"), index.rows.scheme.values, "any");
    options($("method"), index.rows.method.values, "any");
    $("size").replaceChildren(...SIZES.map(([name], place) => make("option", { value: place }, name)));
    const hash = new URLSearchParams(location.hash.slice(1));
    board.task = Math.max(0, index.tasks.findIndex((task) => task.name === hash.get("task")));
    $("task").value = board.task;
    if (isLoss()) Object.assign(board, { sort: "model", down: false });

    $("task").addEventListener("change", () => { board.task = Number($("task").value); board.page = 0; board.open.clear(); chooseTask(); drawTray(); });
    $("rule").addEventListener("change", () => { board.rule = $("rule").value; chooseTask(); });
    for (const id of ["scheme", "method", "size"]) $(id).addEventListener("change", () => { board.page = 0; arrange(); });
    $("query").addEventListener("input", () => { board.page = 0; arrange(); });
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("back").addEventListener("click", () => { board.page -= 1; drawRows(); });
    $("on").addEventListener("click", () => { board.page += 1; drawRows(); });
    $("compare").addEventListener("click", () => { drawOverlay(); $("compared-title").focus(); $("compared").scrollIntoView(); });
    $("close").addEventListener("click", closeOverlay);
    $("clear").addEventListener("click", () => {
      board.picked.clear();
      for (const box of document.querySelectorAll("[data-run]")) box.checked = false;
      drawTray();
    });
    await chooseTask();
    const known = new Map(scores.run.map((run, row) => [run, row]));
    for (const run of (hash.get("runs") ?? "").split(",")) {
      if (known.has(run)) board.picked.set(run, index.rows.model[known.get(run)]);
    }
    if (index.report) await startReport();
    else if (board.picked.size) { drawTray(); drawRows(); drawOverlay(); }
  }

  /** A report shows its runs at once: one opened, several beside each other. */
  async function startReport() {
    const runs = scores.run.map((run, row) => [run, index.rows.model[row]]).filter(([run]) => run !== null);
    for (const id of ["query", "scheme", "method", "size"]) $(id).closest("label").hidden = runs.length <= MOST;
    if (runs.length === 1) return toggleRow(runs[0][0], document.querySelector("[data-open]"));
    for (const [run, model] of runs.slice(0, MOST)) board.picked.set(run, model);
    drawTray();
    drawRows();
    await drawOverlay();
  }

  function chooseTheme(theme) {
    document.documentElement.dataset.theme = theme;
    showTheme();
    redraw();
    try { localStorage.setItem("theme", theme); } catch { /* a viewer that keeps nothing */ }
  }

  function showTheme() {
    $("theme").setAttribute("aria-pressed", String(dark()));
  }

  document.addEventListener("DOMContentLoaded", () => {
    try {
      const kept = localStorage.getItem("theme");
      if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
    } catch { /* a viewer that keeps nothing */ }
    showTheme();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { showTheme(); redraw(); });
    $("theme").addEventListener("click", () => chooseTheme(dark() ? "light" : "dark"));
    start().catch((error) => document.querySelector("main").prepend(make("p", { class: "error", role: "alert" }, `The page's data could not be read: ${error.message}`)));
  });
})();
