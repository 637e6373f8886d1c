"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const NAMES = { both: "Prefill + decode", prefill: "Prefill", decode: "Decode" };
const REASONS = {
  layer: "the policy leaves out the layer",
  phase: "the policy leaves out the phase",
  short: "too few far keys: below break-even",
  mask: "a mask of its own, packed sequences for instance",
  local: "a sliding or chunked layer, local already",
};
const state = { view: "both", head: -1 };
const timeline = data.timeline && unpack(data.timeline);

function make(tag, fields = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name === "style" || name === "dataset") Object.assign(node[name], value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const drawing = (tag, fields) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(fields)) node.setAttribute(name, value);
  return node;
};

/* Numbers as text */
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const ratio = (part, whole) => (whole ? part / whole : null);
const percent = (value, digits = 1) => (value === null ? "–" : (100 * value).toFixed(digits) + "%");
const count = (value) => value.toLocaleString("en");
function amount(value, units, base) {
  let index = 0;
  while (Math.abs(value) >= base && index < units.length - 1) { value /= base; index += 1; }
  return value.toFixed(Math.abs(value) >= 100 || index === 0 ? 0 : 1) + " " + units[index];
}
const flops = (value) => amount(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], 1000);
const bytes = (value) => amount(value, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024);

/* One ramp of one hue; its lightness alone carries the number, away from the page's own colour. */
const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: [[236, 243, 252], [182, 211, 246], [109, 164, 233], [42, 120, 214], [24, 79, 149], [13, 45, 92]],
  dark: [[30, 40, 54], [20, 66, 122], [36, 100, 178], [74, 145, 232], [140, 190, 247], [217, 234, 254]],
};
function shade(value) {
  const ramp = RAMPS[dark.matches ? "dark" : "light"];
  const at = Math.min(Math.max(value, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(at), ramp.length - 2);
  return ramp[low].map((part, i) => Math.round(part + (ramp[low + 1][i] - part) * (at - low)));
}
const rgb = (colour) => `rgb(${colour.join(" ")})`;
function luminance(colour) {
  const [r, g, b] = colour.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
/* Black or white, whichever has more contrast: at least 4.58 to 1 on any colour. */
const ink = (colour) => (luminance(colour) > 0.179 ? "#000000" : "#ffffff");
const rampImage = () => `linear-gradient(90deg, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map((v) => rgb(shade(v))).join(",")})`;

/* The box that follows the pointer */
const tip = $("tip");
function tell(title, body, x, y) {
  tip.replaceChildren(make("b", { textContent: title }), body);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 12 : x + 16;
  const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
}
const hush = () => { tip.hidden = true; };
const below = (node) => { const box = node.getBoundingClientRect(); return [box.left + box.width / 2, box.bottom]; };
addEventListener("keydown", (event) => { if (event.key === "Escape") { hush(); pick(-1); } });
addEventListener("scroll", hush, { passive: true });

/* Phases */
function buildSwitch() {
  for (const view of Object.keys(NAMES)) {
    $("switch").append(make("button", {
      type: "button", role: "radio", textContent: NAMES[view], dataset: { view },
      disabled: data.views[view].calls === 0, title: data.views[view].calls ? "" : "No gated call in this phase",
      onclick: () => { state.view = view; draw(); },
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const open = [...$("switch").children].filter((button) => !button.disabled);
        const next = open[(open.indexOf(event.target) + step + open.length) % open.length];
        next.focus(); next.click();
      },
    }));
  }
}

function drawTiles() {
  const view = data.views[state.view];
  const opened = sum(view.open.flat());
  const asked = sum(view.asked.map((n, i) => n * data.layers[i][1]));
  const density = ratio(sum(view.scored), sum(view.causal));
  const calls = sum(data.dense.map(([, n]) => n));
  const tiles = [
    ["open fraction", percent(ratio(opened, asked)), `${count(opened)} of ${count(asked)} pairs`],
    ["realised density", percent(density), density ? `limit of the speed-up ${(1 / density).toFixed(1)}×` : "no gated call"],
  ];
  const saved = view.savings;
  if (saved && saved.dense_flops) {
    const part = (now, before) => percent(1 - now / before, 0);
    tiles.push(["attention work saved", part(saved.flops, saved.dense_flops),
      `estimate: ${flops(saved.dense_flops - saved.flops)} of ${flops(saved.dense_flops)}`]);
    tiles.push(["cache reads saved", "≤ " + part(saved.bytes, saved.dense_bytes),
      `estimate: ${bytes(saved.dense_bytes - saved.bytes)} of ${bytes(saved.dense_bytes)}`]);
  }
  tiles.push(["opened without asking", count(sum(view.below)), "queries below break-even"]);
  tiles.push(["dense layer calls", count(calls), `${count(data.views.both.calls)} layer calls were gated`]);
  $("tiles").replaceChildren(...tiles.map(([name, number, more]) =>
    make("div", { className: "tile" }, make("span", { textContent: name }), make("b", { textContent: number }),
      make("span", { textContent: more }))));
}

/* Heads */
const cells = new Map();
const key = (layer, head) => layer + "," + head;
function buildGrid() {
  const width = Math.max(0, ...data.layers.map(([, heads]) => heads));
  const grid = $("grid");
  if (!width) { $("grid-box").replaceChildren(make("p", { className: "muted", textContent: "No layer is gated." })); return; }
  const small = width > 16;
  grid.style.maxWidth = 90 + 72 * width + "px";
  grid.style.gridTemplateColumns = `max-content repeat(${width}, minmax(${small ? 6 : 26}px, 1fr))`;
  grid.classList.toggle("small", small);
  grid.append(make("div", { className: "name", textContent: "" }));
  for (let head = 0; head < width; head += 1) {
    grid.append(make("div", { className: "name top", textContent: small && head % 4 ? "" : head }));
  }
  const index = new Map((timeline ? timeline.heads : []).map(([layer, head], i) => [key(layer, head), i]));
  data.layers.forEach(([layer, heads], row) => {
    grid.append(make("div", { className: "name", textContent: `layer ${layer}` }));
    for (let head = 0; head < width; head += 1) {
      if (head >= heads) { grid.append(make("div")); continue; }
      const cell = make("div", {
        className: "cell", role: "option", tabIndex: row || head ? -1 : 0, style: { minHeight: small ? "12px" : "30px" },
        dataset: { layer, head, row, column: head, index: index.get(key(layer, head)) ?? -1 },
      });
      cells.set(key(layer, head), cell);
      grid.append(cell);
    }
  });
  grid.classList.toggle("picks", Boolean(timeline));
  $("heads-hint").textContent = timeline ? "Point at a head for its numbers; click it to see where it opens." : "Point at a head for its numbers.";
  const over = (event) => event.target.closest(".cell");
  grid.addEventListener("pointermove", (event) => { const cell = over(event); cell ? tellCell(cell, event.clientX, event.clientY) : hush(); });
  grid.addEventListener("pointerleave", hush);
  grid.addEventListener("focusin", (event) => { const cell = over(event); if (cell && cell.matches(":focus-visible")) tellCell(cell, ...below(cell)); });
  grid.addEventListener("focusout", hush);
  grid.addEventListener("click", (event) => { const cell = over(event); if (cell) pick(Number(cell.dataset.index)); });
  grid.addEventListener("keydown", (event) => {
    const cell = over(event);
    if (!cell) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(Number(cell.dataset.index)); return; }
    const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] || [0, 0];
    const row = data.layers[Number(cell.dataset.row) + down];
    const next = row && cells.get(key(row[0], Number(cell.dataset.column) + right));
    if (next && next !== cell) { event.preventDefault(); cell.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  });
}
function numbersOf(row, head) {
  const view = data.views[state.view];
  return { opened: view.open[row][head], asked: view.asked[row], below: view.below[row], density: ratio(view.scored[row], view.causal[row]) };
}
function tellCell(cell, x, y) {
  const { layer, head, row } = cell.dataset;
  const n = numbersOf(Number(row), Number(head));
  tell(`Layer ${layer}, head ${head}: ${n.asked ? percent(n.opened / n.asked) + " open" : "never asked"}`,
    `${NAMES[state.view]}\n${count(n.opened)} of ${count(n.asked)} queries\nlayer: realised density ${percent(n.density)}, ` +
    `${count(n.below)} queries below break-even`, x, y);
}
function drawGrid() {
  for (const cell of cells.values()) {
    const n = numbersOf(Number(cell.dataset.row), Number(cell.dataset.head));
    const value = ratio(n.opened, n.asked);
    const colour = value === null ? null : shade(value);
    cell.classList.toggle("unknown", value === null);
    cell.style.background = colour ? rgb(colour) : "";
    cell.style.color = colour ? ink(colour) : "";
    const width = cell.parentNode.style.gridTemplateColumns.includes("26px");
    cell.textContent = width && value !== null ? (100 * value).toFixed(0) : "";
    cell.setAttribute("aria-label", `layer ${cell.dataset.layer}, head ${cell.dataset.head}: ${percent(value)} open`);
    cell.setAttribute("aria-selected", String(timeline !== null && state.head >= 0 && Number(cell.dataset.index) === state.head));
  }
  $("grid-legend").replaceChildren(make("span", {}, "0%", make("i", { className: "bar", style: { background: rampImage() } }), "100% of queries open"));
  const rows = [...cells.values()].map((cell) => {
    const n = numbersOf(Number(cell.dataset.row), Number(cell.dataset.head));
    return [`${cell.dataset.layer}.${cell.dataset.head}`, percent(ratio(n.opened, n.asked)), count(n.opened), count(n.asked), percent(n.density)];
  });
  $("table").replaceChildren(table(["layer.head", "open", "open queries", "asked", "density of layer"], rows));
}
function table(names, rows) {
  return make("table", {}, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { textContent: name })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { textContent: text }))))));
}
function pick(index) {
  if (!timeline || (index < 0 && state.head < 0)) return;
  state.head = index === state.head ? -1 : index;
  draw();
}

/* Tokens */
function unpack(found) {
  const raw = Uint8Array.from(atob(found.bits), (sign) => sign.charCodeAt(0));
  const width = Math.ceil(found.heads.length / 8);
  const n = width ? raw.length / width : 0;
  const counts = new Uint32Array(n);
  for (let t = 0; t < n; t += 1) for (let b = 0; b < width; b += 1) for (let v = raw[t * width + b]; v; v &= v - 1) counts[t] += 1;
  const phases = found.phases.flatMap(([phase, length]) => Array(length).fill(phase));
  const isOpen = (t, head) => (raw[t * width + (head >> 3)] >> (head & 7)) & 1;
  return { heads: found.heads, texts: found.texts, n, counts, phases, isOpen, most: Math.max(1, counts.reduce((a, b) => Math.max(a, b), 0)) };
}
const spans = [];
function buildText() {
  if (!timeline) return;
  $("text-card").hidden = false;
  $("main").classList.add("two");
  const box = $("text");
  if (!timeline.texts) box.remove();
  else {
    const parts = document.createDocumentFragment();
    timeline.texts.forEach((text, token) => {
      const span = make("span", { dataset: { token } });
      span.textContent = text === "" ? "·" : text;
      if (/^\s*\n\s*$/.test(text)) span.prepend(make("i", { textContent: "↵" }));
      if (timeline.phases[token] === "decode") span.className = "decode";
      spans.push(span);
      parts.append(span);
    });
    box.replaceChildren(parts);
    const over = (event) => event.target.closest("[data-token]");
    const show = (event) => {
      const span = over(event);
      light(span ? Number(span.dataset.token) : -1);
      span ? tellToken(Number(span.dataset.token), event.clientX, event.clientY) : hush();
    };
    box.addEventListener("pointermove", show);
    box.addEventListener("click", show);
    box.addEventListener("pointerleave", () => { light(-1); hush(); });
  }
  const strip = $("strip");
  const tokenAt = (event) => { const r = strip.getBoundingClientRect(); return Math.min(timeline.n - 1, Math.max(0, Math.floor((event.clientX - r.left) / r.width * timeline.n))); };
  strip.addEventListener("pointermove", (event) => { const token = tokenAt(event); light(token); tellToken(token, event.clientX, event.clientY); });
  strip.addEventListener("pointerleave", () => { light(-1); hush(); });
  strip.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (!spans.length) return;
    box.scrollTop = spans[token].offsetTop - box.offsetTop - box.clientHeight / 3;
    spans.forEach((span) => span.classList.remove("here"));
    spans[token].classList.add("here");
  });
  new ResizeObserver(drawStrip).observe(strip);
}
let lit = [];
function light(token) {
  lit.forEach((cell) => cell.classList.remove("lit"));
  lit = token < 0 ? [] : openHeads(token).map(([layer, head]) => cells.get(key(layer, head))).filter(Boolean);
  lit.forEach((cell) => cell.classList.add("lit"));
}
const openHeads = (token) => timeline.heads.filter((_, index) => timeline.isOpen(token, index));
function tellToken(token, x, y) {
  const byLayer = new Map();
  for (const [layer, head] of openHeads(token)) byLayer.set(layer, [...(byLayer.get(layer) || []), head]);
  const lines = [...byLayer].slice(0, 12).map(([layer, heads]) => `layer ${layer}: ${heads.length > 1 ? "heads" : "head"} ${heads.join(", ")}`);
  if (byLayer.size > 12) lines.push(`and ${byLayer.size - 12} more layers`);
  const text = timeline.texts ? ` ${JSON.stringify(timeline.texts[token])}` : "";
  const all = timeline.heads.length;
  tell(`Token ${count(token)}${text}`,
    `${timeline.phases[token]}, ${timeline.counts[token]} of ${all} heads open${lines.length ? "\n" + lines.join("\n") : ""}`, x, y);
}
const shown = (token) => state.view === "both" || timeline.phases[token] === state.view;
const level = (token) => (state.head < 0 ? timeline.counts[token] / timeline.most : timeline.isOpen(token, state.head) * 0.75);
function drawText() {
  if (!timeline) return;
  spans.forEach((span, token) => {
    const value = level(token);
    const colour = value > 0 && shown(token) ? shade(0.08 + 0.92 * value) : null;
    span.style.background = colour ? rgb(colour) : "";
    span.style.color = colour ? ink(colour) : "";
    span.classList.toggle("outside", !shown(token));
  });
  const [layer, head] = state.head < 0 ? [] : timeline.heads[state.head];
  const one = state.head >= 0;
  $("text-heading").textContent = one ? `Where layer ${layer}, head ${head} opens` : "Where heads open";
  const hint = timeline.texts ? "Point at a token to see which heads read far keys for it" : "Point at the strip to see which heads read far keys for a token";
  $("text-hint").textContent = `${count(timeline.n)} tokens in the order the model read them. ${hint}; they light up on the left or above.` +
    (timeline.texts ? " Click the strip to go there." : "");
  const legend = one
    ? [make("span", {}, make("i", { className: "dot", style: { background: rgb(shade(0.77)) } }), "open")]
    : [make("span", {}, "0", make("i", { className: "bar", style: { background: rampImage() } }), `${timeline.most} of ${timeline.heads.length} heads open`)];
  if (timeline.phases.includes("decode")) legend.push(make("span", { className: "decode", textContent: "written by the model (decode)" }));
  if (one) legend.push(make("button", { type: "button", textContent: "show all heads", onclick: () => pick(-1) }));
  $("text-legend").replaceChildren(...legend);
  drawStrip();
}
function drawStrip() {
  const strip = $("strip");
  const scale = devicePixelRatio || 1;
  const width = Math.max(1, Math.round(strip.clientWidth * scale)), height = Math.round(96 * scale);
  strip.width = width; strip.height = height;
  const paint = strip.getContext("2d"), style = getComputedStyle(document.documentElement);
  const decode = style.getPropertyValue("--second");
  /* A column is the mean over its tokens, so that nothing is lost where tokens outnumber pixels. */
  for (let x = 0; x < width; x += 1) {
    const from = Math.floor(x * timeline.n / width), to = Math.max(from + 1, Math.floor((x + 1) * timeline.n / width));
    let total = 0, seen = 0, written = 0;
    for (let token = from; token < to && token < timeline.n; token += 1) {
      if (timeline.phases[token] === "decode") written += 1;
      if (shown(token)) { total += level(token); seen += 1; }
    }
    if (seen && total) {
      const value = total / seen;
      paint.fillStyle = rgb(shade(0.25 + 0.75 * value));
      const tall = Math.max(1, value * (height - 8 * scale));
      paint.fillRect(x, height - 5 * scale - tall, 1, tall);
    }
    if (written) { paint.fillStyle = decode; paint.fillRect(x, height - 4 * scale, 1, 4 * scale); }
  }
}

/* Risk */
function buildRisk() {
  const risk = data.risk;
  if (!risk) return;
  $("risk").hidden = false;
  $("risk-hint").textContent = `Missed mass against open pairs, means over heads, on ${count(risk.documents)} documents read by ${risk.model}, dense. ` +
    "A risk target gives each head its own threshold.";
  const W = 460, H = 280, left = 56, bottom = 40, top = 10, right = 12;
  const lines = [
    { name: "risk target", colour: "var(--accent)", points: risk.targets.map(([a, o, m]) => [o, m, `Risk target, alpha ${a}`]) },
    { name: "one threshold for all heads", colour: "var(--second)", points: risk.one.map(([m, o, missed]) => [o, missed, `One threshold, share ${(1 / (1 + Math.exp(-m))).toPrecision(3)}`]) },
  ];
  const highest = Math.max(...lines.flatMap((line) => line.points.map((p) => p[1])), 1e-3);
  const least = 1e-4;
  const decades = Math.max(1, Math.ceil(Math.log10(highest / least)));
  const X = (open) => left + open * (W - left - right);
  const Y = (missed) => H - bottom - Math.log10(Math.max(missed, least) / least) / decades * (H - bottom - top);
  const svg = drawing("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Missed mass against open fraction" });
  const label = (text, fields) => { const node = drawing("text", fields); node.textContent = text; svg.append(node); };
  for (let d = 0; d <= decades; d += 1) {
    const y = Y(least * 10 ** d);
    svg.append(drawing("line", { x1: left, x2: W - right, y1: y, y2: y, class: "rule" }));
    label(percent(least * 10 ** d, Math.max(0, 2 - d)), { x: left - 6, y: y + 4, "text-anchor": "end" });
  }
  for (let x = 0; x <= 1; x += 0.25) label(percent(x, 0), { x: X(x), y: H - bottom + 18, "text-anchor": x === 1 ? "end" : "middle" });
  label("open pairs", { x: (left + W) / 2, y: H - 4, "text-anchor": "middle" });
  label("missed mass", { x: 14, y: H / 2 - 10, transform: `rotate(-90 14 ${H / 2 - 10})`, "text-anchor": "middle" });
  for (const line of lines) {
    svg.append(drawing("polyline", { points: line.points.map((p) => `${X(p[0])},${Y(p[1])}`).join(" "), class: "line", style: `stroke:${line.colour}` }));
  }
  const view = data.views.prefill.calls ? "prefill" : "both";
  const mine = ratio(sum(data.views[view].open.flat()), sum(data.views[view].asked.map((n, i) => n * data.layers[i][1])));
  if (mine !== null) {
    svg.append(drawing("line", { x1: X(mine), x2: X(mine), y1: top, y2: H - bottom, style: "stroke:var(--ink)", "stroke-dasharray": "3 4" }));
    label(`this run, ${NAMES[view].toLowerCase()}`, { x: X(mine) + (mine > 0.6 ? -6 : 6), y: top + 12, "text-anchor": mine > 0.6 ? "end" : "start" });
  }
  const mark = drawing("circle", { r: 5, visibility: "hidden", style: "stroke:var(--card);stroke-width:2" });
  svg.append(mark);
  const every = lines.flatMap((line) => line.points.map((p) => ({ at: [X(p[0]), Y(p[1])], p, colour: line.colour })));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * W / box.width, y = (event.clientY - box.top) * H / box.height;
    const near = every.reduce((a, b) => (Math.hypot(a.at[0] - x, a.at[1] - y) <= Math.hypot(b.at[0] - x, b.at[1] - y) ? a : b));
    mark.setAttribute("cx", near.at[0]); mark.setAttribute("cy", near.at[1]);
    mark.style.fill = near.colour; mark.setAttribute("visibility", "visible");
    tell(near.p[2], `${percent(near.p[0])} of pairs open\n${percent(near.p[1], 2)} of the attention missed`, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", () => { mark.setAttribute("visibility", "hidden"); hush(); });
  $("risk-plot").append(svg);
  $("risk-legend").append(...lines.map((line) => make("span", {}, make("i", { className: "dot", style: { background: line.colour } }), line.name)));
}

function buildRest() {
  const policy = data.policy;
  $("notes").append(...data.notes.map((text) => make("p", { textContent: text })));
  $("subtitle").textContent = `Sink ${policy.sink_size}, window ${policy.window_size}, ${policy.gate.kind} gate, backend ${data.backend}`;
  $("policy").textContent = JSON.stringify(policy, null, 2).replace(/\[[\d,\s]*\]/g, (list) => list.replace(/\s+/g, " "));
  if (!data.dense.length) { $("dense").append(make("p", { className: "muted", textContent: "None: every layer call went through the gate." })); return; }
  const found = table(["reason", "layer calls", ""], data.dense.map(([reason, calls]) => [reason, count(calls), REASONS[reason] || ""]));
  found.querySelectorAll("td:last-child").forEach((cell) => { cell.className = "wrap"; });
  $("dense").append(found);
}

function draw() {
  for (const button of $("switch").children) {
    const on = button.dataset.view === state.view;
    button.setAttribute("aria-checked", String(on));
    button.tabIndex = on ? 0 : -1;
  }
  drawTiles(); drawGrid(); drawText();
}
dark.addEventListener("change", draw);
buildSwitch(); buildGrid(); buildText(); buildRisk(); buildRest(); draw();
