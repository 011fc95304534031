"use strict";
(() => {
  const data = JSON.parse(document.getElementById("heat-data").textContent);
  const $ = (id) => document.getElementById("heat-" + id);
  const PALETTES = /*PALETTES*/{};
  const PAIR = { key: "pair", label: "KL before | after, side by side", scale: "positive", note: "full-vocabulary KL(teacher ‖ student), nats" };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const u16 = (text) => new Uint16Array(bytes(text).buffer);
  const u32 = (text) => new Uint32Array(bytes(text).buffer);
  const state = { block: 0, response: 0, quantity: 0, palette: "cividis", token: 0 };
  const opened = new Map();

  // Unpacks a block the first time it is shown.
  function open(index) {
    if (!opened.has(index)) {
      const block = data.blocks[index];
      const values = {};
      for (const [key, packed] of Object.entries(block.values)) values[key] = { ...packed, coded: u16(packed.data) };
      const top = {};
      for (const [side, packed] of Object.entries(block.top)) top[side] = { k: packed.k, ids: u16(packed.ids), p: u16(packed.p) };
      const quantities = block.kind === "frozen" ? [PAIR, ...block.quantities] : block.quantities;
      opened.set(index, { ...block, quantities, values, top, tokens: u32(block.tokens), kept: bytes(block.kept) });
    }
    return opened.get(index);
  }
  const value = (block, key, t) => {
    const v = block.values[key];
    return !v || v.coded[t] === 65535 ? null : v.low + (v.high - v.low) * v.coded[t] / 65534;
  };
  const isKept = (block, t) => ((block.kept[t >> 3] >> (7 - (t & 7))) & 1) === 1;
  const text = (block, t) => data.pieces[block.tokens[t]];
  const shown = (piece) => piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ $/, "␣").replace(/^ /, "·") || "∅";
  const number = (x) => x === null ? "–" : Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 1 ? x.toFixed(2) : x.toFixed(3);

  // Colours: a list of [r, g, b] from low to high, linear in between; black or white text by contrast.
  function color(fraction, palette) {
    const stops = PALETTES[palette];
    const x = Math.max(0, Math.min(1, fraction)) * (stops.length - 1);
    const i = Math.min(Math.floor(x), stops.length - 2);
    return stops[i].map((c, n) => Math.round(c + (stops[i + 1][n] - c) * (x - i)));
  }
  function ink([r, g, b]) {
    const linear = [r, g, b].map((c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000" : "#fff";
  }
  const paletteFor = (quantity) => quantity.scale === "signed" ? "signed" : state.palette;
  const range = (block, quantity) => block.values[quantity.key === "pair" ? "KLf_full_base" : quantity.key].colors;

  function options(select, names, chosen) {
    select.replaceChildren(...names.map((name, i) => new Option(name, i, i === chosen, i === chosen)));
  }
  function drawControls() {
    const block = open(state.block);
    const kinds = { rollout: "Training rollouts", frozen: "Frozen contexts" };
    options($("block"), data.blocks.map((b) => kinds[b.kind] + " · " + b.arm), state.block);
    options($("quantity"), block.quantities.map((q) => q.label), state.quantity);
    options($("response"), block.responses.map((r) => r.name), state.response);
    $("palette").value = state.palette;
  }
  function drawLegend() {
    const block = open(state.block), quantity = block.quantities[state.quantity];
    const [low, high] = range(block, quantity);
    const stops = [];
    for (let i = 0; i <= 16; i++) stops.push("rgb(" + color(i / 16, paletteFor(quantity)).join(",") + ")");
    $("bar").style.background = "linear-gradient(90deg," + stops.join(",") + ")";
    $("low").textContent = number(low); $("high").textContent = number(high) + (quantity.scale === "unit" ? "" : " or more");
    $("note").textContent = quantity.key === "pair" ? quantity.note : quantity.label + ": " + quantity.note;
    $("ring").hidden = !block.selects;
    $("ring").textContent = block.kind === "frozen" ? "would be kept" : "kept";
    $("caption").textContent = block.caption + (block.selects ? "" : ". This method keeps every token, so no ring is drawn") + ".";
  }
  function panel(block, response, quantity, title) {
    const box = document.createElement("div"); box.className = "panel";
    if (title) { const h = document.createElement("h4"); h.textContent = title; box.append(h); }
    const list = document.createElement("div");
    list.className = "tokens"; list.setAttribute("role", "listbox"); list.setAttribute("aria-orientation", "horizontal");
    list.setAttribute("aria-label", "Tokens of " + response.name + (title ? ", " + title : "") + ", coloured by " + quantity.label);
    const [low, high] = range(block, quantity);
    for (let i = 0; i < response.length; i++) {
      const t = response.start + i, v = value(block, quantity.key, t), span = document.createElement("span");
      const rgb = v === null ? [255, 255, 255] : color((v - low) / (high - low || 1), paletteFor(quantity));
      const kept = block.selects && isKept(block, t);
      span.className = kept ? "token kept" : "token";
      span.setAttribute("role", "option"); span.setAttribute("aria-selected", "false"); span.tabIndex = -1; span.dataset.i = i;
      span.style.background = "rgb(" + rgb.join(",") + ")"; span.style.color = ink(rgb);
      span.textContent = shown(text(block, t));
      span.setAttribute("aria-label", text(block, t) + ", position " + (i + 1) + " of " + response.length + (kept ? ", kept" : "") + ", " + quantity.label + " " + number(v));
      list.append(span);
      if (text(block, t).includes("\n")) list.append(document.createElement("br"));
    }
    box.append(list);
    return box;
  }
  function drawResponse() {
    const block = open(state.block), quantity = block.quantities[state.quantity], response = block.responses[state.response];
    const prompt = $("prompt"); prompt.replaceChildren();
    const part = (name, content) => { const b = document.createElement("b"); b.textContent = name + " "; prompt.append(b, content, "   "); };
    if (response.prompt !== null) part("prompt", response.prompt);
    if (response.label !== null) part("right answer", response.label);
    part("tokens", response.length < response.of ? response.length + " of " + response.of : String(response.length));
    if (response.note) part("", response.note);
    const byKey = (key) => block.quantities.find((q) => q.key === key);
    $("panels").replaceChildren(...(quantity.key === "pair"
      ? [panel(block, response, byKey("KLf_full_base"), "before training"), panel(block, response, byKey("KLf_full"), "after training")]
      : [panel(block, response, quantity, "")]));
    select(Math.min(state.token, response.length - 1), false);
  }
  function select(i, focus, list) {
    const block = open(state.block), response = block.responses[state.response];
    state.token = i;
    document.querySelectorAll("#heat-panels .tokens").forEach((box) => {
      box.querySelectorAll(".token").forEach((span, n) => {
        const here = n === i;
        span.tabIndex = here ? 0 : -1; span.setAttribute("aria-selected", here ? "true" : "false");
        span.classList.toggle("twin", here);
        if (here && focus && (!list || list === box)) span.focus({ preventScroll: false });
      });
    });
    drawDetail(block, response.start + i, i, response);
  }
  function row(table, name, content) {
    const tr = table.insertRow(), th = document.createElement("th");
    th.scope = "row"; th.textContent = name; tr.append(th); tr.insertCell().textContent = content;
  }
  function drawDetail(block, t, i, response) {
    const box = $("details"); box.replaceChildren();
    const left = document.createElement("div"), what = document.createElement("p"), code = document.createElement("code"), table = document.createElement("table");
    what.className = "what"; code.textContent = shown(text(block, t));
    what.append(code, " token " + (i + 1) + " of " + response.length + (block.selects ? (block.kind === "frozen" ? (isKept(block, t) ? ", would be kept" : ", would not be kept") : (isKept(block, t) ? ", kept" : ", not kept")) : ""));
    for (const q of block.quantities) if (q.key !== "pair") row(table, q.label, number(value(block, q.key, t)));
    for (const [key, name] of Object.entries(block.raw)) row(table, name, number(value(block, key, t)));
    left.append(what, table); box.append(left);
    const tops = document.createElement("div"); tops.className = "tops";
    const names = block.kind === "frozen" ? { student: "student before", teacher: "teacher", trained: "student after" } : { student: "student", teacher: "teacher" };
    for (const [side, name] of Object.entries(names)) if (block.top[side]) tops.append(drawTop(block, block.top[side], name, t));
    if (!tops.childElementCount) tops.textContent = "No top-K lists were exported (--opd-token-bank-raw-topk).";
    box.append(tops);
  }
  function drawTop(block, top, name, t) {
    const box = document.createElement("div"), h = document.createElement("h5");
    box.className = "top"; h.textContent = "Top " + top.k + ", " + name; box.append(h);
    for (let k = 0; k < top.k; k++) {
      const id = top.ids[t * top.k + k], p = top.p[t * top.k + k] / 65535;
      if (id === 65535) continue;
      const line = document.createElement("div"), code = document.createElement("code"), bar = document.createElement("i"), b = document.createElement("b");
      if (id === block.tokens[t]) line.className = "sampled";
      code.textContent = shown(data.pieces[id]); code.title = data.pieces[id];
      bar.style.width = (100 * p).toFixed(1) + "%"; b.textContent = (100 * p).toFixed(p > 0.1 ? 1 : 2) + " %";
      line.append(code, bar, b); box.append(line);
    }
    return box;
  }
  function go(change) {
    Object.assign(state, change);
    drawControls(); drawLegend(); drawResponse();
  }
  function toResponse(step, focus) {
    const count = open(state.block).responses.length;
    go({ response: (state.response + step + count) % count, token: 0 });
    if (focus) select(0, true);
  }
  function toBlock(index) {
    const same = data.blocks[index].kind === data.blocks[state.block].kind;
    const count = data.blocks[index].responses.length;
    go({ block: index, response: same ? Math.min(state.response, count - 1) : 0, quantity: same ? state.quantity : 0, token: same ? state.token : 0 });
  }
  function keyed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const block = open(state.block), response = block.responses[state.response], last = response.length - 1;
    const list = event.target.closest(".tokens");
    const moves = {
      ArrowLeft: () => select(Math.max(0, state.token - 1), true, list), ArrowRight: () => select(Math.min(last, state.token + 1), true, list),
      Home: () => select(0, true, list), End: () => select(last, true, list),
      ArrowUp: () => toResponse(-1, true), ArrowDown: () => toResponse(1, true),
      k: () => { for (let n = 1; n <= last + 1; n++) { const i = (state.token + n) % (last + 1); if (isKept(block, response.start + i)) { select(i, true, list); break; } } },
      c: () => { go({ quantity: (state.quantity + 1) % block.quantities.length }); select(state.token, true); },
    };
    const move = moves[event.key] || moves[event.key.toLowerCase()];
    if (move) { event.preventDefault(); move(); }
  }
  $("block").addEventListener("change", (e) => toBlock(+e.target.value));
  $("quantity").addEventListener("change", (e) => go({ quantity: +e.target.value }));
  $("response").addEventListener("change", (e) => go({ response: +e.target.value, token: 0 }));
  $("palette").addEventListener("change", (e) => go({ palette: e.target.value }));
  $("previous").addEventListener("click", () => toResponse(-1, false));
  $("next").addEventListener("click", () => toResponse(1, false));
  const panels = $("panels");
  panels.addEventListener("keydown", keyed);
  panels.addEventListener("mouseover", (e) => { const s = e.target.closest(".token"); if (s) select(+s.dataset.i, false); });
  panels.addEventListener("focusin", (e) => { const s = e.target.closest(".token"); if (s && +s.dataset.i !== state.token) select(+s.dataset.i, false); });
  panels.addEventListener("click", (e) => { const s = e.target.closest(".token"); if (s) select(+s.dataset.i, true, s.closest(".tokens")); });
  // The first block whose method selects is the most telling one to open with, at its first kept token.
  const telling = data.blocks.findIndex((b) => b.selects && b.kind === "rollout");
  go({ block: Math.max(0, telling) });
  const first = open(state.block).responses[0];
  for (let i = 0; i < first.length; i++) if (isKept(open(state.block), first.start + i)) { select(i, false); break; }
})();
