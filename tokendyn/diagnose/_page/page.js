"use strict";
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const layers = report.layers;
  const SVG = "http://www.w3.org/2000/svg";
  const colour = (name) => `var(--${name})`;
  const short = (name) => name.length > 26 ? "…" + name.slice(-25) : name;
  const fmt = (v) => v === null || v === undefined || Number.isNaN(v) ? "–"
    : v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2).replace(/\.?0+e\+?/, "e") : String(+v.toPrecision(4));
  const get = (value, ...keys) => keys.reduce((v, k) => (v === null || v === undefined ? null : v[k] ?? null), value);

  function node(name, attributes, parent, text) {
    const element = document.createElementNS(SVG, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  }

  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; tip.setAttribute("role", "status");
  document.body.appendChild(tip);
  function show(text, x, y) {
    tip.textContent = text; tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y - box.height - 12 < 4 ? y + 16 : y - box.height - 12) + "px";
  }
  const hide = () => { tip.hidden = true; };

  /* Marks of a logarithmic axis whose ends are powers of ten: decades, or 1, 2, 5 of each where few are in sight. */
  function logTicks(low, high) {
    const found = [], every = Math.ceil((high - low) / 6), steps = high - low > 2 ? [1] : [1, 2, 5];
    for (let d = Math.floor(low); d <= high; d++) if (d % every === 0) for (const m of steps) found.push(d + Math.log10(m));
    const seen = found.filter((v) => v >= low && v <= high);
    return seen.length > 1 ? seen : ticks(low, high, 4);
  }

  function ticks(low, high, count) {
    const step0 = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(step0));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= step0 * 0.999);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    return found;
  }

  /* One plot: series of points in a frame that can be hovered, zoomed and walked through with the keyboard. */
  class Plot {
    constructor(host, options) {
      this.options = options;
      this.box = document.createElement("figure");
      this.box.className = "plot" + (options.square ? " square" : ""); this.box.style.margin = 0;
      const title = document.createElement("h3"); title.textContent = options.title;
      const note = document.createElement("p"); note.className = "soft"; note.textContent = options.note || "";
      this.svg = node("svg", { role: "img", tabindex: 0, "aria-label": `${options.title}. ${options.note || ""} Arrow keys walk through the points, plus and minus zoom, 0 resets.` });
      this.legend = document.createElement("div"); this.legend.className = "legend";
      for (const s of options.series || []) if (s.name) {
        const entry = document.createElement("span"), mark = document.createElement("i");
        mark.style.background = colour(s.colour); entry.append(mark, s.name); this.legend.append(entry);
      }
      this.box.append(title, note, this.svg, this.legend); host.append(this.box);
      this.reset();
      this.listen();
      this.draw();
      new ResizeObserver(() => this.draw()).observe(this.svg);
    }

    bounds() {
      const o = this.options;
      if (o.cells) { const end = o.cells.length * o.size + 0.5; return [0.5, end, 0.5, end]; } // token k fills k ± ½
      let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
      for (const s of o.series) s.x.forEach((x, i) => {
        for (const y of [s.y[i], s.base ? s.base[i] : s.y[i]]) {
          if (y === null || y === undefined || (o.log && y <= 0)) continue;
          const v = o.log ? Math.log10(y) : y;
          x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, v); y1 = Math.max(y1, v);
        }
      });
      if (x0 > x1) return [0, 1, 0, 1];
      if (o.yRange) [y0, y1] = o.yRange;
      if (o.equal) { const r = Math.max(Math.abs(x0), Math.abs(x1), Math.abs(y0), Math.abs(y1)) * 1.08 || 1; return [-r, r, -r, r]; }
      const px = o.bars ? 0.6 : (x1 - x0 || 1) * 0.02, py = o.yRange ? 0 : (y1 - y0 || Math.abs(y1) || 1) * 0.06;
      return [x0 - px, x1 + px, y0 - py, y1 + py];
    }
    reset() { this.view = this.bounds(); this.at = -1; }

    draw() {
      const o = this.options, svg = this.svg, width = svg.clientWidth, height = svg.clientHeight;
      if (!width) return;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`); svg.replaceChildren();
      let left = 52, right = 8, top = 8, bottom = 38;
      if (o.cells || o.equal) {
        const side = Math.min(width - left - right, height - top - bottom), spare = width - left - right - side;
        left += spare / 2; right += spare / 2; bottom = height - top - side;
      }
      const w = width - left - right, h = height - top - bottom, [x0, x1, y0, y1] = this.view;
      this.frame = { left, top, w, h };
      this.px = (x) => left + (x - x0) / (x1 - x0) * w;
      this.py = (y) => o.cells ? top + (y - y0) / (y1 - y0) * h : top + (y1 - (o.log ? Math.log10(y) : y)) / (y1 - y0) * h;
      const axis = node("g", { class: "axis" }, svg);
      const xs = o.labels ? this.layerTicks(x0, x1, w) : ticks(x0, x1, Math.max(2, w / 80));
      for (const v of xs) {
        node("line", { x1: this.px(v), x2: this.px(v), y1: top, y2: top + h }, axis);
        node("text", { x: this.px(v), y: top + h + 15, "text-anchor": "middle" }, axis, fmt(v));
      }
      for (const v of o.log ? logTicks(y0, y1) : ticks(y0, y1, h / 42)) {
        const y = o.cells ? this.py(v) : top + (y1 - v) / (y1 - y0) * h;
        node("line", { x1: left, x2: left + w, y1: y, y2: y, class: !o.log && v === 0 && !o.cells ? "zero" : "" }, axis);
        node("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, axis, o.log ? fmt(+(10 ** v).toPrecision(3)) : fmt(v));
      }
      node("text", { x: left + w / 2, y: top + h + 31, "text-anchor": "middle" }, axis, o.xLabel || "");
      node("text", { x: 12, y: top + h / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${top + h / 2})` }, axis, o.yLabel || "");
      const id = "clip" + Plot.count++;
      node("rect", { x: left, y: top, width: w, height: h }, node("clipPath", { id }, svg));
      const g = node("g", { "clip-path": `url(#${id})` }, svg);
      this.points = [];
      if (o.cells) this.drawCells(g); else for (const s of o.series) this.drawSeries(g, s);
      this.mark = node("circle", { r: 6, fill: "none", stroke: colour("ink"), "stroke-width": 2, visibility: "hidden" }, svg);
      if (this.at >= this.points.length) this.at = -1;
    }

    layerTicks(x0, x1, w) {
      const every = Math.max(1, Math.ceil((x1 - x0) / (w / 34))), found = [];
      for (let v = Math.max(0, Math.ceil(x0)); v <= x1; v++) if (v % every === 0) found.push(v);
      return found;
    }

    drawCells(g) {
      const { cells, size } = this.options, top = Math.max(...cells.flat()) || 1;
      const flat = cells.flat().filter((v) => v > 0).sort((a, b) => a - b), low = flat[Math.floor(flat.length * 0.02)] || 1e-6;
      const wide = this.px(size) - this.px(0), high = this.py(size) - this.py(0);
      cells.forEach((row, i) => row.forEach((v, j) => {
        if (j > i) return;
        const share = v <= 0 ? 0 : Math.max(0, Math.min(1, Math.log(v / low) / Math.log(top / low || 2)));
        node("rect", { x: this.px(j * size + 0.5), y: this.py(i * size + 0.5), width: wide + 0.4, height: high + 0.4, fill: colour("accent"), "fill-opacity": (0.03 + 0.97 * share ** 1.4).toFixed(3) }, g);
      }));
      this.cell = (x, y) => {
        const [x0, x1, y0, y1] = this.view, f = this.frame;
        const j = Math.floor((x0 + (x - f.left) / f.w * (x1 - x0) - 0.5) / size), i = Math.floor((y0 + (y - f.top) / f.h * (y1 - y0) - 0.5) / size);
        return cells[i] && j >= 0 && j <= i ? { i, j, v: cells[i][j] } : null;
      };
    }

    drawSeries(g, s) {
      const o = this.options, good = s.x.map((x, i) => i).filter((i) => s.y[i] !== null && s.y[i] !== undefined && (!o.log || s.y[i] > 0));
      const place = (i) => [this.px(s.x[i]), this.py(s.y[i])];
      if (s.kind === "bar") for (const i of good) {
        const base = s.base ? s.base[i] : 0, wide = Math.max(2, (this.px(1) - this.px(0)) * 0.72);
        node("rect", { x: this.px(s.x[i]) - wide / 2, y: this.py(s.y[i]), width: wide, height: Math.max(0, this.py(base) - this.py(s.y[i])), fill: colour(s.colour) }, g);
      } else if (s.kind === "dots") for (const i of good) {
        const [x, y] = place(i); node("circle", { cx: x, cy: y, r: s.radius || 4, fill: colour(s.colour), "fill-opacity": 0.75 }, g);
      } else if (good.length) {
        node("path", { d: "M" + good.map((i) => place(i).map((v) => v.toFixed(1)).join(",")).join("L"), fill: "none", stroke: colour(s.colour), "stroke-width": s.thin ? 1.2 : 2, "stroke-dasharray": s.dashed ? "5 4" : "none" }, g);
        if (good.length < 40) for (const i of good) { const [x, y] = place(i); node("circle", { cx: x, cy: y, r: 3, fill: colour(s.colour) }, g); }
      }
      for (const i of good) {
        const [x, y] = place(i);
        this.points.push({ x, y, text: s.tell ? s.tell(i) : `${s.name || o.title}\n${o.labels ? layers[s.x[i]].name : (o.xLabel || "x") + " " + fmt(s.x[i])}: ${fmt(s.base ? s.y[i] - s.base[i] : s.y[i])}` });
      }
    }

    locate(event) { const r = this.svg.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; }
    point(i) {
      const p = this.points[i]; if (!p) return;
      this.at = i; const r = this.svg.getBoundingClientRect();
      this.mark.setAttribute("cx", p.x); this.mark.setAttribute("cy", p.y); this.mark.setAttribute("visibility", "visible");
      show(p.text, r.left + p.x, r.top + p.y);
    }
    zoom(factor, fx = 0.5, fy = 0.5) {
      const [x0, x1, y0, y1] = this.view, x = x0 + fx * (x1 - x0), both = this.options.equal || this.options.cells;
      this.view = [x + (x0 - x) * factor, x + (x1 - x) * factor, y0, y1];
      if (both) { const y = this.options.cells ? y0 + fy * (y1 - y0) : y1 - fy * (y1 - y0); this.view[2] = y + (y0 - y) * factor; this.view[3] = y + (y1 - y) * factor; }
      this.draw();
    }
    move(dx, dy) { const [x0, x1, y0, y1] = this.view; this.view = [x0 + dx, x1 + dx, y0 + dy, y1 + dy]; this.draw(); }
    listen() {
      const svg = this.svg; let from = null;
      svg.addEventListener("pointermove", (e) => {
        if (from && e.buttons) {
          const [x0, x1, y0, y1] = this.view, both = this.options.equal || this.options.cells, sign = this.options.cells ? -1 : 1;
          this.move(-(e.clientX - from[0]) / this.frame.w * (x1 - x0), both ? sign * (e.clientY - from[1]) / this.frame.h * (y1 - y0) : 0);
          from = [e.clientX, e.clientY]; hide(); return;
        }
        const [x, y] = this.locate(e);
        if (this.options.cells) {
          const c = this.cell && this.cell(x, y), size = this.options.size;
          const span = (k) => size === 1 ? k + 1 : `${k * size + 1}–${(k + 1) * size}`; // token 1 is the first
          if (c) show(`token ${span(c.i)} looks at ${span(c.j)}\n${fmt(100 * c.v)} % of its attention`, e.clientX, e.clientY); else hide();
          return;
        }
        let best = -1, near = 1600;
        this.points.forEach((p, i) => { const d = (p.x - x) ** 2 + (p.y - y) ** 2; if (d < near) { near = d; best = i; } });
        if (best >= 0) this.point(best); else { hide(); this.mark.setAttribute("visibility", "hidden"); }
      });
      svg.addEventListener("pointerdown", (e) => { if (e.pointerType === "mouse") from = [e.clientX, e.clientY]; });
      addEventListener("pointerup", () => { from = null; });
      svg.addEventListener("pointerleave", () => { hide(); if (this.mark) this.mark.setAttribute("visibility", "hidden"); });
      svg.addEventListener("blur", () => { hide(); if (this.mark) this.mark.setAttribute("visibility", "hidden"); });
      svg.addEventListener("dblclick", () => { this.reset(); this.draw(); });
      svg.addEventListener("wheel", (e) => {
        if (!e.ctrlKey && !e.shiftKey && document.activeElement !== svg) return; // a page that scrolls is not a plot that zooms
        e.preventDefault(); const [x, y] = this.locate(e), f = this.frame;
        this.zoom(e.deltaY + e.deltaX > 0 ? 1.2 : 1 / 1.2, (x - f.left) / f.w, (y - f.top) / f.h);
      }, { passive: false });
      svg.addEventListener("keydown", (e) => {
        const n = this.points.length;
        if (e.key === "+" || e.key === "=") this.zoom(1 / 1.25); else if (e.key === "-") this.zoom(1.25);
        else if (e.key === "0") { this.reset(); this.draw(); }
        else if (e.key === "ArrowRight" && n) this.point((this.at + 1) % n); else if (e.key === "ArrowLeft" && n) this.point((this.at - 1 + n) % n);
        else if (e.key === "Escape") hide(); else return;
        e.preventDefault();
      });
    }
  }
  Plot.count = 0;

  const depth = layers.map((_, i) => i);
  const over = (...keys) => layers.map((layer) => get(layer, ...keys));

  function overview() {
    const host = document.getElementById("overview");
    const stacks = ["convergence", "slow divergence", "fast divergence"], colours = ["shrink", "slow", "fast"];
    if (layers.some((layer) => layer.regime)) {
      let base = depth.map(() => 0);
      const series = stacks.map((kind, k) => {
        const share = over("regime", "shares", kind), y = share.map((v, i) => (v === null ? null : base[i] + v)), s = { name: kind, colour: colours[k], kind: "bar", x: depth, y, base };
        base = y.map((v, i) => v ?? base[i]); return s;
      });
      new Plot(host, { title: "Regime of every layer", note: "Share of the movement of token coordinates that shrinks them, grows them while Δ falls, grows them while Δ rises.", series, labels: true, bars: true, yRange: [0, 1], xLabel: "layer", yLabel: "share" });
      new Plot(host, { title: "How fast tokens grow: theory", note: "Relative growth of a token's norm in one unit of time, dx/dt = P x: 5 %, median and 95 % over tokens.", labels: true, xLabel: "layer", yLabel: "rate", series: [
        { name: "95 %", colour: "fast", thin: true, x: depth, y: over("regime", "rate", "p95") }, { name: "median", colour: "ink", x: depth, y: over("regime", "rate", "median") }, { name: "5 %", colour: "shrink", thin: true, x: depth, y: over("regime", "rate", "p05") }] });
    }
    if (layers.some((layer) => layer.growth)) {
      new Plot(host, { title: "How fast tokens grow: measured", note: "ln(norm after / norm before) of the residual stream across the layer's block, over tokens, beside the median that theory predicts of the scan alone.", labels: true, xLabel: "layer", yLabel: "growth", series: [
        { name: "95 %", colour: "fast", thin: true, x: depth, y: over("growth", "measured", "p95") }, { name: "median", colour: "ink", x: depth, y: over("growth", "measured", "median") }, { name: "5 %", colour: "shrink", thin: true, x: depth, y: over("growth", "measured", "p05") }, { name: "predicted median", colour: "other", dashed: true, x: depth, y: over("growth", "predicted", "median") }] });
    }
    if (layers.some((layer) => layer.tokens)) {
      new Plot(host, { title: "Tokens over depth", note: "Mean cosine of two tokens, and of a token with the first, in the residual stream after each block: 1 is collapse.", labels: true, xLabel: "layer", yLabel: "cosine", series: [
        { name: "any two", colour: "accent", x: depth, y: over("tokens", "cosine") }, { name: "with the first", colour: "slow", dashed: true, x: depth, y: over("tokens", "cosine_with_first") }] });
      new Plot(host, { title: "Effective rank and clusters", note: "exp of the entropy of the tokens' singular values; clusters of tokens with a cosine above 0.95.", labels: true, log: true, xLabel: "layer", yLabel: "number", series: [
        { name: "effective rank", colour: "accent", x: depth, y: over("tokens", "effective_rank") }, { name: "clusters", colour: "other", dashed: true, x: depth, y: over("tokens", "clusters") }] });
      new Plot(host, { title: "Token norms", note: "In the residual stream after each block.", labels: true, log: true, xLabel: "layer", yLabel: "norm", series: [
        { name: "95 %", colour: "fast", thin: true, x: depth, y: over("tokens", "norm", "p95") }, { name: "median", colour: "ink", x: depth, y: over("tokens", "norm", "median") }, { name: "5 %", colour: "shrink", thin: true, x: depth, y: over("tokens", "norm", "p05") }] });
    }
    new Plot(host, { title: "Step sizes Δ", note: "Over tokens and channels.", labels: true, log: true, xLabel: "layer", yLabel: "Δ", series: [
      { name: "greatest", colour: "fast", thin: true, x: depth, y: over("memory", "delta", "max") }, { name: "median", colour: "ink", x: depth, y: over("memory", "delta", "median") }, { name: "5 %", colour: "shrink", thin: true, x: depth, y: over("memory", "delta", "p05") }] });
    new Plot(host, { title: "Memory", note: "Horizon 1/(|A| Δ) in tokens: how long until a token has decayed to 1/e.", labels: true, log: true, xLabel: "layer", yLabel: "tokens", series: [
      { name: "95 %", colour: "fast", thin: true, x: depth, y: over("memory", "horizon", "p95") }, { name: "median", colour: "ink", x: depth, y: over("memory", "horizon", "median") }, { name: "length of the input", colour: "other", dashed: true, x: depth, y: over("shape", "tokens") }] });
    new Plot(host, { title: "Attention sinks", note: "Mean attention that later tokens give to the first token, to the strongest one, and an even spread for comparison.", labels: true, xLabel: "layer", yLabel: "attention", series: [
      { name: "strongest", colour: "fast", x: depth, y: over("attention", "top_sink") }, { name: "first token", colour: "accent", x: depth, y: over("attention", "first_token_sink") }, { name: "first, even spread", colour: "other", dashed: true, x: depth, y: over("attention", "first_token_even") }] });
  }

  function facts(host, layer) {
    const list = document.createElement("dl"); list.className = "facts";
    for (const [name, value] of [
      ["regime", get(layer, "regime", "kind")], ["x₁ᵀ M x₁ of the first token", get(layer, "regime", "first_token", "product")], ["pairs with xₗᵀ M xⱼ > 0", get(layer, "regime", "pair_positive")],
      ["channels growing", get(layer, "regime", "channels_growing")], ["layers for a change by e, in theory", get(layer, "regime", "e_fold")], ["growth has the sign predicted", get(layer, "growth", "sign_agreement")], ["growth, rank correlation", get(layer, "growth", "correlation")], ["‖M‖₂", get(layer, "spectrum", "norm")], ["rank of M", get(layer, "spectrum", "rank")], ["positive part of spectrum", get(layer, "spectrum", "positive_weight")],
      ["attention entropy", get(layer, "attention", "entropy")], ["mean look-back", get(layer, "attention", "mean_distance")],
      ["stable poles", get(layer, "sphere", "stable_pole_count")], ["distance to ±x₁", get(layer, "sphere", "distance_to_first")], ["moves towards ±x₁", get(layer, "sphere", "towards_first")], ["moves towards nearest pole", get(layer, "sphere", "towards_pole")],
      ["powers of 10 to overflow", get(layer, "health", "headroom")], ["attention explains output to", get(layer, "attention", "reconstruction")], ["Δ of 1st token / others", get(layer, "memory", "first_token_step")]]) {
      const row = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name; dd.textContent = typeof value === "number" ? fmt(value) : value ?? "–"; row.append(dt, dd); list.append(row);
    }
    host.append(list);
    for (const note of layer.notes || []) { const p = document.createElement("p"); p.className = "soft"; p.textContent = "Note: " + note + "."; host.append(p); }
  }

  /* How far the tokens are from every point that theory sends them to. */
  function limits(host, points) {
    const box = document.createElement("div"), table = document.createElement("table"), head = table.createTHead().insertRow();
    box.className = "scroll"; box.tabIndex = 0; box.setAttribute("role", "region"); box.setAttribute("aria-label", "Limit points on the sphere");
    for (const name of ["limit point", "predicted", "distance, 5 %", "median", "95 %", "tokens nearest", "rate there"]) {
      const th = document.createElement("th"); th.scope = "col"; th.textContent = name; head.append(th);
    }
    const body = table.createTBody();
    for (const p of points) {
      const row = body.insertRow(), near = p.nearest === null ? "–" : (100 * p.nearest).toFixed(0) + " %";
      for (const text of [p.point, p.predicted ? "yes" : "no", fmt(get(p, "distance", "p05")), fmt(get(p, "distance", "median")), fmt(get(p, "distance", "p95")), near, fmt(p.rate)]) row.insertCell().textContent = text;
    }
    const title = document.createElement("h3"), note = document.createElement("p"); note.className = "soft";
    title.textContent = "Limit points on the sphere";
    note.textContent = "Distance is 1 − cosine (0: there, 1: at a right angle); of the hyperplane, |cosine| with its normal. ±x₁ are the limits where Δ is shared by the channels, poles ±eν where it is not; channels are counted from 0, tokens from 1.";
    box.append(table); host.append(title, note, box);
  }

  function detail(index) {
    const host = document.getElementById("detail"), layer = layers[index]; host.replaceChildren();
    document.getElementById("pick").value = String(index);
    document.querySelectorAll("#layers tbody tr").forEach((row, i) => row.setAttribute("aria-selected", String(i === index)));
    facts(host, layer);
    const grid = document.createElement("div"); grid.className = "grid"; host.append(grid);
    const a = layer.attention, s = layer.spectrum;
    if (a) {
      new Plot(grid, { title: "Hidden attention", square: true, note: `Mean of |P| over ${a.channels} of ${a.of} channels, rows normalised, on a logarithmic scale.`, cells: a.picture.cells, size: a.picture.size, xLabel: "token looked at", yLabel: "token looking" });
      const place = a.sink.map((_, i) => i + 1);
      new Plot(grid, { title: "Sink score of every position", square: true, note: "Mean attention from all later tokens, beside an even spread.", log: true, xLabel: "position", yLabel: "attention", series: [
        { name: "this layer", colour: "accent", x: place.slice(0, -1), y: a.sink.slice(0, -1) }, { name: "even spread", colour: "other", dashed: true, x: place.slice(0, -1), y: a.even.slice(0, -1) }] });
    }
    if (s) {
      const note = (s.normalised ? "Of the projections, before the norm that follows them. " : "") + (s.biased ? "Biases of B and C are not part of it." : "");
      new Plot(grid, { title: "Eigenvalues of M = S_Cᵀ S_B", square: true, equal: true, note: "In the complex plane; N of them are not zero by rank. " + note, xLabel: "real part", yLabel: "imaginary part", series: [
        { name: "eigenvalue", colour: "accent", kind: "dots", x: s.eigenvalues.map((v) => v[0]), y: s.eigenvalues.map((v) => v[1]), tell: (i) => `λ = ${fmt(s.eigenvalues[i][0])} ${s.eigenvalues[i][1] < 0 ? "−" : "+"} ${fmt(Math.abs(s.eigenvalues[i][1]))}i` }] });
      new Plot(grid, { title: "Spectrum of the symmetric part", square: true, note: "Magnitudes tell layers apart; the count of signs is N and N for every free layer. " + note, bars: true, xLabel: "rank", yLabel: "σ", series: [
        { name: "positive", colour: "fast", kind: "dots", x: s.symmetric.map((_, i) => i).filter((i) => s.symmetric[i] >= 0), y: s.symmetric.filter((v) => v >= 0) }, { name: "negative", colour: "shrink", kind: "dots", x: s.symmetric.map((_, i) => i).filter((i) => s.symmetric[i] < 0), y: s.symmetric.filter((v) => v < 0) }] });
    }
    if (layer.regime) new Plot(grid, { title: "Growth of every token", square: true, note: "Relative rate at which a token's norm grows under dx/dt = P x; below 0 it shrinks.", xLabel: "position", yLabel: "rate", series: [{ name: "rate", colour: "accent", x: layer.regime.rate_of_token.place.map((v) => v + 1), y: layer.regime.rate_of_token.value }] });
    if (layer.regime) {
      const c = layer.regime.channels, colours = { convergence: "shrink", "slow divergence": "slow", "fast divergence": "fast", divergence: "fast", mixed: "other", stationary: "soft" };
      const series = c.kinds.map((kind, k) => { const of = c.place.map((_, i) => i).filter((i) => c.kind[i] === k);
        return { name: kind, colour: colours[kind], kind: "dots", radius: 2.5, x: of.map((i) => c.place[i]), y: of.map((i) => c.rate[i]), tell: (n) => `channel ${c.place[of[n]]}: ${kind}\nrate ${fmt(c.rate[of[n]])}, mean Δ ${fmt(layer.memory.channels.delta[of[n]])}` }; }).filter((s) => s.x.length);
      new Plot(grid, { title: "Regime of every channel", square: true, note: "Relative rate of a channel's coordinates under dx/dt = P x, by the regime of its own movement.", xLabel: "channel", yLabel: "rate", series });
    }
    if (layer.sphere) {
      const p = layer.sphere.coordinates;
      new Plot(grid, { title: "Tokens on the sphere", square: true, equal: true, note: "Normalised tokens along the first token (across) and along the direction in which the others spread most (up). ±x₁ lie at (±1, 0).", xLabel: "along x₁", yLabel: "across", series: [
        { name: "token", colour: "accent", kind: "dots", radius: 3, x: p.map((v) => v[0]), y: p.map((v) => v[1]) }, { name: "±x₁", colour: "fast", kind: "dots", radius: 6, x: [1, -1], y: [0, 0] }] });
    }
    for (const c in (a && a.of_channel) || {}) new Plot(grid, { title: `Hidden attention of channel ${c}`, square: true, note: "|P| of this channel, rows normalised.", cells: a.of_channel[c].cells, size: a.of_channel[c].size, xLabel: "token looked at", yLabel: "token looking" });
    if (layer.sphere && layer.sphere.limit_points.length) limits(host, layer.sphere.limit_points);
  }

  overview();
  const pick = document.getElementById("pick");
  layers.forEach((layer, i) => { const option = document.createElement("option"); option.value = String(i); option.textContent = `${i}  ${layer.name}`; pick.append(option); });
  pick.addEventListener("change", () => detail(Number(pick.value)));
  document.querySelectorAll("#layers button").forEach((button) => button.addEventListener("click", () => { detail(Number(button.dataset.layer)); document.getElementById("one").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" }); pick.focus({ preventScroll: true }); }));
  if (layers.length) detail(0);
})();
