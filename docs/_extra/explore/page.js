/* The page: a problem as controls, its trajectory, hidden attention and regime. */
"use strict";

(() => {
  const { simulate, attention } = TokenDynamics, { classify, number } = TokenRegimes, { axisOf, colour, drawLine, drawPlane, drawSphere } = TokenPlots;
  const $ = (id) => document.getElementById(id);
  const MOST = 8, DEGREE = Math.PI / 180;

  const PRESETS = {
    "Convergence": { space: "line", mu: -1.5, sDelta: -0.4, a: 1, bias: 0, x0: [1.8, -1.2, 0.9, -0.5], end: 4, log: true },
    "Slow divergence": { space: "line", mu: 1, sDelta: -0.8, a: 1, bias: 0, x0: [2.65, 2.9, 3.2, 3.6], end: 6, log: true },
    "Fast divergence": { space: "line", mu: 1, sDelta: 0.7, a: 1, bias: 0, x0: [0.3, -1, 1.2], end: 1, log: true },
    "A trained step size: laws set in late": { space: "line", mu: -1.3, sDelta: 0.7, a: 0.8, bias: -4.6, x0: [1.2, -0.8, 0.3], end: 6, log: true },
    "Plane, negative definite": { space: "plane", M: [[-1, 0.3], [0.3, -0.7]], sDelta: [[0.4, -0.3], [0.2, 0.5]], a: 1, bias: 0, x0: [[1, 0.6], [-0.7, 1.1], [0.4, -1.2]], end: 3, log: true },
    "Plane, a positive eigenvalue, yet token 1 converges": { space: "plane", M: [[1, 0], [0, -1]], sDelta: [0, 0], a: 1, bias: 0, x0: [[0.1, 1], [1, 0.2]], end: 1, log: true },
    "Plane, positive definite": { space: "plane", M: [[1, 0.2], [0.2, 0.6]], sDelta: [[-0.9, -0.4], [-0.3, -0.8]], a: 1, bias: 0, x0: [[0.6, 0.9], [1.1, 0.4], [0.5, 0.5]], end: 3, log: true },
    "Sphere, all come to ± token 1": { space: "sphere", M: [[1, 0.3, 0], [0.1, 0.8, 0], [0, 0, 0.6]], sDelta: [0.4, -0.3, 0.2], a: 1, bias: 0, x0: [[20, 30], [110, -20], [-160, 50], [-60, -40]], end: 1.5, log: false },
    "Sphere, token 1 drives the others away": { space: "sphere", M: [[-1, 0.3, 0], [0.1, -0.8, 0], [0, 0, -0.6]], sDelta: [0.4, -0.3, 0.2], a: 1, bias: 0, x0: [[20, 30], [35, 20], [5, 45]], end: 1.5, log: false },
    "Sphere, a step size per channel: the poles": { space: "sphere", M: [[1, 0, 0], [0, 0.9, 0], [0, 0, 0.8]], sDelta: [[1.2, 0, 0], [0, 0.4, 0], [0, 0, 0.2]], a: 1, bias: 0, x0: [[50, 20], [110, -20], [-160, 50]], end: 1.7, log: false },
  };
  const blank = {
    line: () => ({ ...PRESETS["Fast divergence"] }), plane: () => ({ ...PRESETS["Plane, negative definite"] }), sphere: () => ({ ...PRESETS["Sphere, all come to ± token 1"] }),
  };
  const copy = (value) => JSON.parse(JSON.stringify(value));
  let state = copy(PRESETS["Fast divergence"]), share = 0, view = { yaw: 0.6, pitch: 0.35 }, found = null, playing = 0;

  /* The problem as the equations take it: tokens on the sphere are held as longitude and latitude in degrees. */
  function problem() {
    const { end, log, ...p } = copy(state);
    if (p.space === "sphere") p.x0 = p.x0.map(([a, b]) => [Math.cos(b * DEGREE) * Math.cos(a * DEGREE), Math.cos(b * DEGREE) * Math.sin(a * DEGREE), Math.sin(b * DEGREE)]);
    return p;
  }

  // ------------------------------------------------------------------------------------------------ controls
  let serial = 0;
  function element(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }
  /* A label, a slider and a number for one value; both inputs say the same. */
  function field(name, get, set, low, high, step, mark) {
    const id = `f${serial++}`, label = element("label", { htmlFor: id });
    if (mark) { const dot = element("span", { className: "swatch" }); dot.style.background = mark; label.append(dot); }
    label.append(name);
    const slider = element("input", { type: "range", min: low, max: high, step, value: get(), id });
    const exact = element("input", { type: "number", step: "any", value: get() });
    exact.setAttribute("aria-label", `${name}, exact value`);
    const change = (from, to) => () => {
      const value = parseFloat(from.value);
      if (!Number.isFinite(value)) return;
      to.value = value; set(value); renew();
    };
    slider.addEventListener("input", change(slider, exact));
    exact.addEventListener("input", change(exact, slider));
    return element("div", { className: "field" }, label, slider, exact);
  }
  function matrix(title, rows, names) {
    const grid = element("div", { className: "matrix" });
    grid.style.setProperty("--columns", rows[0].length);
    rows.forEach((row, i) => row.forEach((value, j) => {
      const input = element("input", { type: "number", step: 0.1, value });
      input.setAttribute("aria-label", names(i, j));
      input.addEventListener("input", () => { const v = parseFloat(input.value); if (Number.isFinite(v)) { row[j] = v; renew(); } });
      grid.append(input);
    }));
    return element("fieldset", {}, element("legend", { textContent: title }), grid);
  }
  const positive = (set) => (v) => set(Math.max(v, 1e-3));

  function build() {
    const host = $("parameters"), tokens = $("tokens");
    host.replaceChildren(); tokens.replaceChildren();
    for (const radio of document.querySelectorAll("[name=space]")) radio.checked = radio.value === state.space;
    const one = element("div", {});
    if (state.space === "line") {
      one.append(
        field("μ", () => state.mu, (v) => { state.mu = v; }, -3, 3, 0.05),
        field("S_Δ", () => state.sDelta, (v) => { state.sDelta = v; }, -3, 3, 0.05),
      );
    }
    one.append(
      field("a", () => state.a, positive((v) => { state.a = v; }), 0.05, 4, 0.05),
      field("bias", () => state.bias, (v) => { state.bias = v; }, -8, 3, 0.1),
    );
    if (state.space !== "line") {
      const each = Array.isArray(state.sDelta[0]);
      host.append(matrix("M = S_Cᵀ S_B", state.M, (i, j) => `M, row ${i + 1}, column ${j + 1}`));
      const check = element("input", { type: "checkbox", checked: each, id: "each" });
      check.addEventListener("change", () => {
        state.sDelta = check.checked ? state.M.map(() => [...state.sDelta]) : [...state.sDelta[0]];
        build(); renew(); $("each").focus();
      });
      host.append(matrix("S_Δ", each ? state.sDelta : [state.sDelta], (i, j) => `S_Δ, row ${i + 1}, column ${j + 1}`));
      host.append(element("label", { className: "check" }, check, " a step size Δ per channel"));
    }
    host.append(one);
    state.x0.forEach((x, l) => {
      const name = `x${"₁₂₃₄₅₆₇₈"[l]}`, mark = colour(l);
      if (state.space === "line") tokens.append(field(name, () => state.x0[l], (v) => { state.x0[l] = v; }, -4, 4, 0.05, mark));
      else {
        const parts = state.space === "plane" ? [["", -3, 3, 0.05], ["", -3, 3, 0.05]] : [[" lon.", -180, 180, 1], [" lat.", -90, 90, 1]];
        parts.forEach(([tail, low, high, step], d) => tokens.append(field(`${name}${tail || `, ${d + 1}`}`, () => state.x0[l][d], (v) => { state.x0[l][d] = v; }, low, high, step, mark)));
      }
    });
    $("add").disabled = state.x0.length >= MOST;
    $("remove").disabled = state.x0.length <= 1;
    $("depth").replaceChildren(field("log₁₀ t", () => state.end, (v) => { state.end = Math.max(-3, Math.min(v, state.space === "line" ? 30 : 6)); }, -2, state.space === "line" ? 12 : 4, 0.1));
    $("log").checked = state.log;
    $("channel-row").hidden = state.space === "line";
    const count = state.space === "line" ? 0 : state.M.length, chosen = Math.min($("channel").selectedIndex, count - 1);
    $("channel").replaceChildren(...Array.from({ length: count }, (_, d) => element("option", { textContent: String(d + 1) })));
    if (count) $("channel").selectedIndex = Math.max(0, chosen);
    $("legend").replaceChildren(...state.x0.map((_, l) => {
      const dot = element("span", { className: "swatch" });
      dot.style.background = colour(l);
      return element("span", {}, dot, `token ${l + 1}`);
    }));
  }

  // ------------------------------------------------------------------------------------------------- results
  const COLOURS = { "convergence": "shrink", "slow divergence": "slow", "fast divergence": "fast", "consensus": "shrink", "repulsion": "fast" };
  const NOTES = {
    line: "Dotted: a token goes to infinity there.",
    plane: "Rings: the start; they can be dragged. Discs: at the depth chosen below. Cut off where a token leaves the picture.",
    sphere: "Rings: the start. Discs: at the depth chosen below. Dotted or small: behind. Drag, or use the arrow keys, to turn the sphere.",
  };

  function renew() {
    const p = problem();
    found = { p, trajectory: simulate(p, 10 ** state.end, { rtol: 1e-7, maxSteps: 3000 }), axis: axisOf(10 ** state.end, state.log) };
    describe(classify(p));
    $("paths-note").textContent = NOTES[p.space];
    $("python").textContent = python(p);
    draw();
    history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(state)));
  }

  function describe(regime) {
    const host = $("regime"), { trajectory, p } = found;
    const kind = element("p", { className: "kind", textContent: regime.kind });
    kind.style.setProperty("--colour", `var(--${COLOURS[regime.kind] || "other"})`);
    const lines = [...regime.explanation];
    const ends = trajectory.endedBy.map((by, l) => (by === l ? l : -1)).filter((l) => l >= 0).sort((k, l) => trajectory.endedAt[k] - trajectory.endedAt[l]);
    if (ends.length) lines.push(`Simulated: ${ends.map((l) => `token ${l + 1} goes to infinity at t = ${number(trajectory.endedAt[l])}`).join(", ")}.`);
    if (!["reached t_end", "all tokens ended"].includes(trajectory.reason)) lines.push(`The simulation stopped at t = ${number(trajectory.stoppedAt)}: ${trajectory.reason}. The library goes further.`);
    if (regime.fates && p.space === "plane") lines.push(`Tokens: ${regime.fates.map((fate, l) => `${l + 1} ${fate}`).join(", ")}.`);
    const known = { theorem: "a published theorem", derived: "derived in the documentation", simulated: "seen in a simulation" }[regime.certainty];
    host.replaceChildren(kind, ...lines.map((line) => element("p", { textContent: line })), element("p", { className: "soft", textContent: `How this is known: ${known}.` }));
  }

  function draw() {
    const { p, trajectory, axis } = found, svg = $("paths"), moment = Math.min(axis.time(share), trajectory.stoppedAt);
    const now = moment > 0 ? trajectory.at(moment) : p.x0;
    if (p.space === "line") drawLine(svg, p, trajectory, axis, moment, now);
    else if (p.space === "plane") grab(drawPlane(svg, p, trajectory, now));
    else drawSphere(svg, p, trajectory, now, view);
    $("moment").textContent = `t = ${number(moment)}`;
    $("cursor").setAttribute("aria-valuetext", `t = ${number(moment)}`);
    drawAttention(now);
  }

  function drawAttention(now) {
    const { p } = found, all = attention(p, now), P = p.space === "line" ? all : (all[$("channel").selectedIndex] || []);
    const largest = Math.max(...P.flat().map(Math.abs), 0) || 1, L = state.x0.length, table = $("attention");
    const head = element("tr", {}, element("td", {}), ...Array.from({ length: L }, (_, j) => element("th", { scope: "col", textContent: `j = ${j + 1}` })));
    const rows = Array.from({ length: L }, (_, l) => {
      const row = element("tr", {}, element("th", { scope: "row", textContent: `l = ${l + 1}` }));
      for (let j = 0; j < L; j++) {
        const cell = element("td", {});
        if (l >= now.length) { cell.className = "empty"; cell.textContent = j <= l ? "ended" : ""; }
        else if (j <= l) {
          const value = P[l][j], part = Math.round(56 * Math.abs(value) / largest);
          cell.textContent = number(value);
          cell.style.background = `color-mix(in srgb, var(--${value < 0 ? "minus" : "plus"}) ${part}%, var(--card))`;
        }
        row.append(cell);
      }
      return row;
    });
    table.replaceChildren(element("tbody", {}, head, ...rows));
    const where = p.space === "line" ? "" : ", in this channel";
    $("attention-note").textContent = `Row l: the weights of the tokens j ≤ l that move token l${where}. Blue positive, orange negative; the stronger the colour, the larger.`;
  }

  function python(p) {
    const text = (value) => JSON.stringify(value, (key, v) => (typeof v === "number" ? +v.toPrecision(6) : v)).replaceAll(",", ", ");
    const M = p.space === "line" ? `mu=${p.mu}` : `M=${text(p.M)}`, name = p.space === "sphere" ? "classify_sphere" : "classify";
    return `tokendyn.${name}(${M}, s_delta=${text(p.sDelta)}, a=${p.a}, bias=${p.bias}, x0=${text(p.x0)})`;
  }

  // -------------------------------------------------------------------------------------------------- events
  function grab({ handles, value }) {
    handles.forEach((handle, l) => handle.addEventListener("pointerdown", (down) => {
      down.preventDefault();
      const svg = $("paths"), box = svg.getBoundingClientRect();
      const move = (event) => {
        state.x0[l] = value(event.clientX - box.left, event.clientY - box.top).map((v) => Math.round(v * 100) / 100);
        build(); renew();
      };
      const stop = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", stop); removeEventListener("pointercancel", stop); };
      addEventListener("pointermove", move); addEventListener("pointerup", stop); addEventListener("pointercancel", stop);
    }));
  }
  const turn = (dx, dy) => { view.yaw += dx; view.pitch = Math.max(-1.5, Math.min(1.5, view.pitch + dy)); draw(); };
  $("paths").addEventListener("keydown", (event) => {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!arrows) return;
    if (state.space === "sphere") turn(0.1 * arrows[0], 0.1 * arrows[1]);
    else if (arrows[0]) look(share + 0.02 * arrows[0]);
    else return;
    event.preventDefault();
  });
  $("paths").addEventListener("pointermove", (event) => { if (state.space === "sphere" && event.buttons) turn(-event.movementX / 150, event.movementY / 150); });
  function look(to) {
    share = Math.max(0, Math.min(1, to));
    $("cursor").value = Math.round(1000 * share);
    draw();
  }
  $("cursor").addEventListener("input", () => look($("cursor").value / 1000));
  $("channel").addEventListener("change", draw);
  $("log").addEventListener("change", () => { state.log = $("log").checked; renew(); });
  $("add").addEventListener("click", () => {
    state.x0.push(state.space === "line" ? 0.5 : state.space === "plane" ? [0.5, -0.5] : [90, 10]);
    build(); renew();
  });
  $("remove").addEventListener("click", () => { state.x0.pop(); build(); renew(); });
  $("play").addEventListener("click", () => {
    cancelAnimationFrame(playing);
    if ($("play").textContent === "Stop") { $("play").textContent = "Play"; return; }
    $("play").textContent = "Stop";
    const begun = performance.now(), from = share >= 1 ? 0 : share;
    const tick = (time) => {
      look(from + (time - begun) / 8000);
      if (share < 1) playing = requestAnimationFrame(tick); else $("play").textContent = "Play";
    };
    playing = requestAnimationFrame(tick);
  });
  for (const radio of document.querySelectorAll("[name=space]")) radio.addEventListener("change", () => { start(blank[radio.value]()); document.querySelector("[name=space]:checked").focus(); });
  $("preset").append(...Object.keys(PRESETS).map((name) => element("option", { textContent: name })));
  $("preset").addEventListener("change", () => start(PRESETS[$("preset").value]));
  addEventListener("resize", () => draw());
  addEventListener("hashchange", () => { const given = fromAddress(); if (given) start(given); });

  /* A problem from the address, if it holds a whole one. */
  function fromAddress() {
    try {
      const given = JSON.parse(decodeURIComponent(location.hash.slice(1))), D = { plane: 2, sphere: 3 }[given.space];
      const finite = (v, ...shape) => (shape.length ? Array.isArray(v) && (shape[0] === null ? v.length > 0 && v.length <= MOST : v.length === shape[0]) && v.every((x) => finite(x, ...shape.slice(1))) : Number.isFinite(v));
      const common = finite(given.a) && given.a > 0 && finite(given.bias) && finite(given.end) && Math.abs(given.end) <= 30;
      if (given.space === "line") return common && finite(given.mu) && finite(given.sDelta) && finite(given.x0, null) ? given : null;
      return D && common && finite(given.M, D, D) && (finite(given.sDelta, D) || finite(given.sDelta, D, D)) && finite(given.x0, null, 2) ? given : null;
    } catch { return null; }
  }
  function start(given) {
    state = copy(given);
    share = 0; $("cursor").value = 0;
    const name = Object.keys(PRESETS).find((key) => JSON.stringify(PRESETS[key]) === JSON.stringify(state));
    if (name) $("preset").value = name;
    build(); renew();
  }
  start(fromAddress() || PRESETS["Fast divergence"]);
})();
