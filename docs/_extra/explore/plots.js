/* Drawings of trajectories: tokens over depth, paths in the plane, paths on the sphere. */
"use strict";

const TokenPlots = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const colour = (l) => `var(--t${(l % 8) + 1})`;
  const label = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(0).replace("e+", "e") : String(+v.toPrecision(4)));

  function node(parent, name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999), found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    return found;
  }

  /* Frame, grid and numbers; returns the maps from values to pixels. */
  function frame(svg, [x0, x1], [y0, y1], xTicks, xLabel, yLabel, square) {
    const width = svg.clientWidth || 600, height = svg.clientHeight || 340;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    let left = 50, right = 10, top = 8, bottom = 40;
    if (square) {
      const side = Math.min(width - left - right, height - top - bottom);
      left += (width - left - right - side) / 2; right = width - left - side; bottom = height - top - side;
    }
    const w = width - left - right, h = height - top - bottom, axis = node(svg, "g", { class: "axis" });
    const px = (v) => left + ((v - x0) / (x1 - x0)) * w, py = (v) => top + ((y1 - v) / (y1 - y0)) * h;
    for (const [at, text] of xTicks) {
      node(axis, "line", { x1: px(at), x2: px(at), y1: top, y2: top + h, class: square && at === 0 ? "zero" : "" });
      node(axis, "text", { x: px(at), y: top + h + 16, "text-anchor": "middle" }, text);
    }
    for (const v of ticks(y0, y1, h / 50)) {
      node(axis, "line", { x1: left, x2: left + w, y1: py(v), y2: py(v), class: v === 0 ? "zero" : "" });
      node(axis, "text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, label(v));
    }
    node(axis, "text", { x: left + w / 2, y: top + h + 34, "text-anchor": "middle" }, xLabel);
    node(axis, "text", { x: left - 38, y: top + h / 2, "text-anchor": "middle", transform: `rotate(-90 ${left - 38} ${top + h / 2})` }, yLabel);
    const clip = node(svg, "clipPath", { id: "frame" });
    node(clip, "rect", { x: left, y: top, width: w, height: h });
    return { px, py, left, top, w, h, inside: node(svg, "g", { "clip-path": "url(#frame)" }) };
  }
  const polyline = (points) => (points.length ? "M" + points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L") : "");

  /* Depths from 0 to the end, evenly on the axis that is shown; a logarithmic one begins six decades before its end. */
  function axisOf(tEnd, log) {
    const top = Math.log10(tEnd), bottom = Math.min(-2, top - 4);
    return {
      range: log ? [bottom, top] : [0, tEnd],
      time: (share) => (log ? (share === 0 ? 0 : 10 ** (bottom + share * (top - bottom))) : share * tEnd),
      place: (t) => (log ? Math.log10(Math.max(t, 10 ** bottom)) : t),
      ticks: () => {
        if (!log) return ticks(0, tEnd, 6).map((v) => [v, label(v)]);
        const every = Math.ceil((top - bottom) / 8), found = [];
        for (let d = Math.ceil(bottom); d <= top; d++) if (d % every === 0) found.push([d, Math.abs(d) > 3 ? `1e${d}` : String(+(10 ** d).toPrecision(2))]);
        return found;
      },
    };
  }

  function drawLine(svg, p, trajectory, axis, moment, now) {
    const shares = Array.from({ length: 361 }, (_, i) => axis.time(i / 360)).filter((t) => t <= trajectory.stoppedAt);
    const near = trajectory.endedAt.filter(Number.isFinite).flatMap((T) => [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8].map((part) => T * (1 - part)));
    const depths = [...shares, ...near, trajectory.stoppedAt].sort((a, b) => a - b);
    const rows = depths.map((t) => [t, trajectory.at(t)]);
    const start = Math.max(1e-9, ...p.x0.map(Math.abs)), ends = trajectory.endedAt.some(Number.isFinite);
    let reach = Math.max(...rows.flatMap(([, x]) => x.map(Math.abs)), start) * 1.08;
    if (ends) reach = Math.min(reach, 5 * start);
    const low = p.x0.some((x) => x < 0) ? -reach : 0, high = p.x0.some((x) => x > 0) ? reach : low ? 0 : 1;
    const f = frame(svg, axis.range, [low, high], axis.ticks(), "depth t", "token x", false);
    p.x0.forEach((_, l) => {
      const points = rows.filter(([t, x]) => l < x.length && t < trajectory.endedAt[l]).map(([t, x]) => [f.px(axis.place(t)), f.py(Math.max(-1e3 * reach, Math.min(1e3 * reach, x[l])))]);
      node(f.inside, "path", { class: "path", stroke: colour(l), d: polyline(points) });
      if (trajectory.endedBy[l] === l) {
        const x = f.px(axis.place(trajectory.endedAt[l]));
        node(f.inside, "line", { class: "ended", stroke: colour(l), x1: x, x2: x, y1: f.top, y2: f.top + f.h });
      }
    });
    const x = f.px(axis.place(moment));
    node(f.inside, "line", { class: "cursor-line", x1: x, x2: x, y1: f.top, y2: f.top + f.h });
    now.forEach((value, l) => node(f.inside, "circle", { class: "now", cx: x, cy: f.py(value), r: 5, fill: colour(l) }));
  }

  function drawPlane(svg, p, trajectory, now) {
    const every = Math.ceil(trajectory.times.length / 700);
    const rows = trajectory.times.filter((_, i, all) => i % every === 0 || i === all.length - 1).map((t) => trajectory.at(t));
    const start = Math.max(0.1, ...p.x0.flat().map(Math.abs));
    const reach = Math.min(2.5 * start, 1.1 * Math.max(start, ...rows.flat(2).map(Math.abs)));
    const marks = ticks(-reach, reach, 5).map((v) => [v, label(v)]);
    const f = frame(svg, [-reach, reach], [-reach, reach], marks, "channel 1", "channel 2", true);
    const far = 50 * reach, place = (x) => [f.px(Math.max(-far, Math.min(far, x[0]))), f.py(Math.max(-far, Math.min(far, x[1])))];
    const handles = p.x0.map((x0, l) => {
      node(f.inside, "path", { class: "path", stroke: colour(l), d: polyline([x0, ...rows.filter((x) => l < x.length).map((x) => x[l])].map(place)) });
      const [cx, cy] = place(x0);
      return node(f.inside, "circle", { class: "handle", cx, cy, r: 8, fill: colour(l), "fill-opacity": 0.25, stroke: colour(l) });
    });
    now.forEach((x, l) => { const [cx, cy] = place(x); node(f.inside, "circle", { class: "now", cx, cy, r: 5, fill: colour(l) }); });
    const value = (px, py) => [-reach + ((px - f.left) / f.w) * 2 * reach, reach - ((py - f.top) / f.h) * 2 * reach];
    return { handles, value };
  }

  /* The sphere seen from a direction: yaw and pitch in radians. */
  function drawSphere(svg, p, trajectory, now, { yaw, pitch }) {
    const width = svg.clientWidth || 600, height = svg.clientHeight || 340, radius = Math.min(width, height) / 2 - 26;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const turn = ([x, y, z]) => {
      const u = x * Math.cos(yaw) + y * Math.sin(yaw), depth = -x * Math.sin(yaw) + y * Math.cos(yaw);
      return [width / 2 + radius * u, height / 2 - radius * (z * Math.cos(pitch) + depth * Math.sin(pitch)), -depth * Math.cos(pitch) + z * Math.sin(pitch)];
    };
    const front = node(svg, "g", {}), curve = (points, attributes) => {
      let run = [], side = null;
      const flush = () => { if (run.length > 1) node(front, "path", { ...attributes, class: `${attributes.class}${side ? "" : " back"}`, d: polyline(run) }); };
      for (const [x, y, z] of points.map(turn)) {
        if (side !== null && side !== z >= 0) { run.push([x, y]); flush(); run = []; }
        side = z >= 0; run.push([x, y]);
      }
      flush();
    };
    node(front, "circle", { class: "outline", cx: width / 2, cy: height / 2, r: radius });
    const circle = Array.from({ length: 61 }, (_, i) => (i * Math.PI) / 30);
    for (const b of [-60, -30, 0, 30, 60].map((v) => (v * Math.PI) / 180)) curve(circle.map((t) => [Math.cos(t) * Math.cos(b), Math.sin(t) * Math.cos(b), Math.sin(b)]), { class: "grid" });
    for (const a of [0, 30, 60, 90, 120, 150].map((v) => (v * Math.PI) / 180)) curve(circle.map((t) => [Math.cos(a) * Math.cos(t), Math.sin(a) * Math.cos(t), Math.sin(t)]), { class: "grid" });
    "₁₂₃".split("").forEach((name, d) => {
      const [x, y] = turn([0, 1, 2].map((i) => (i === d ? 1.1 : 0)));
      node(node(front, "g", { class: "axis" }), "text", { x, y: y + 4, "text-anchor": "middle" }, `e${name}`);
    });
    const rows = Array.from({ length: 301 }, (_, i) => trajectory.at(trajectory.stoppedAt * (i / 300) ** 2));
    p.x0.forEach((x0, l) => {
      curve(rows.map((x) => x[l]), { class: "path", stroke: colour(l) });
      const [cx, cy, z] = turn(x0);
      node(front, "circle", { cx, cy, r: 6, fill: "none", stroke: colour(l), "stroke-width": 2, class: z < 0 ? "start back" : "start" });
    });
    now.forEach((x, l) => { const [cx, cy, z] = turn(x); node(front, "circle", { class: "now", cx, cy, r: z < 0 ? 4 : 6, fill: colour(l) }); });
  }

  return { axisOf, colour, drawLine, drawPlane, drawSphere };
})();
