/* What becomes of every token, and why: the decisions of tokendyn.classify and tokendyn.classify_sphere.

   A test compares kinds, fates, constants, bounds and rates with the library's. */
"use strict";

const TokenRegimes = (() => {
  const { softplus, dot, norm, form, shared, steps, flow, simulate } =
    typeof require === "function" ? require("./dynamics.js") : TokenDynamics;

  const number = (v) => (v === 0 || (Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5) ? String(+v.toPrecision(4)) : v.toExponential(2));
  const list = (tokens) => `token${tokens.length > 1 ? "s" : ""} ${tokens.map((l) => l + 1).join(", ")}`;

  // Nodes and weights of Gauss and Legendre on [0, 1].
  const GAUSS = Array.from({ length: 12 }, (_, i) => {
    const n = 12;
    let x = Math.cos((Math.PI * (i + 0.75)) / (n + 0.5)), derivative = 1;
    for (let round = 0; round < 50; round++) {
      let before = 1, value = x;
      for (let k = 2; k <= n; k++) [before, value] = [value, ((2 * k - 1) * x * value - (k - 1) * before) / k];
      derivative = (n * (x * value - before)) / (x * x - 1);
      x -= value / derivative;
    }
    return [(1 + x) / 2, 1 / ((1 - x * x) * derivative * derivative)];
  });
  const integral = (f, low, high) => (high - low) * GAUSS.reduce((sum, [x, weight]) => sum + weight * f(low + (high - low) * x), 0);

  /* ∫_x^∞ du / (μ u³ Δ(u)): when a token alone on the line with S_Δ x ≥ 0 blows up; others do so no later. */
  function blowUpBound(p, x) {
    const z = p.sDelta * x;
    if (!(p.mu > 0) || z < 0 || x === 0) return Infinity;
    if (z === 0) return 0.5 / softplus(p.bias) / (p.mu * x * x);
    let total = 0, high = 1;
    for (; z / high + p.bias < 38; high /= 2) total += integral((v) => v / softplus(z / v + p.bias), high / 2, high);
    total += integral((v) => (v * v) / (z + p.bias * v), 0, high);
    return total / (p.mu * x * x);
  }

  /* Tokens on the line: everything follows from the signs of μ and of S_Δ x_l. */
  function classifyLine(p) {
    const pulls = p.x0.map((x) => p.sDelta * x), zero = p.x0.map((x) => x === 0), step0 = softplus(p.bias);
    let ended = false, least = Infinity;
    const known = zero.some(Boolean) || p.bias !== 0 ? "derived" : "theorem";
    const certainties = [];
    const fates = p.x0.map((x, l) => {
      ended = ended || (!zero[l] && (pulls[l] > 0 || p.sDelta === 0));
      const fate = zero[l] || p.mu === 0 ? "stationary" : p.mu < 0 ? "convergence" : ended ? "blow-up" : "slow divergence";
      certainties.push(fate === "blow-up" && pulls[l] <= 0 ? "derived" : known);
      return fate;
    });
    const kind = ["blow-up", "slow divergence", "convergence"].find((fate) => fates.includes(fate)) || "stationary";
    const moving = pulls.filter((_, l) => !zero[l]), nearest = Math.min(...moving.map(Math.abs)), farthest = Math.max(0, ...moving);
    const margin = kind === "convergence" ? -p.mu : kind === "slow divergence" ? Math.min(p.mu, nearest) : kind === "blow-up" ? Math.min(p.mu, farthest) : 0;
    const bounds = p.x0.map((x, l) => (least = Math.min(least, blowUpBound(p, x)), fates[l] === "blow-up" ? least : Infinity));
    let last = -1;
    const constants = p.x0.map((x, l) => {
      const gap = last < 0 ? 0 : l - last;
      if (!zero[l]) last = l;
      if (fates[l] === "convergence") return Math.sqrt((gap ? -Math.expm1(-p.a * step0 * gap) : 1) / (2 * Math.abs(p.mu) * step0));
      if (fates[l] === "slow divergence") return 1 / Math.abs(p.sDelta);
      if (fates[l] !== "blow-up") return 0;
      if (p.sDelta === 0) return gap ? Infinity : (2 * p.mu * step0) ** -0.5;
      return pulls[l] > 0 ? (3 * p.mu * Math.abs(p.sDelta)) ** (-1 / 3) : Infinity;
    });
    const regime = {
      kind: kind === "blow-up" ? "fast divergence" : kind, fates, margin, bounds, constants,
      certainty: certainties.includes("derived") ? "derived" : "theorem",
    };
    return { ...regime, explanation: explainLine(p, regime) };
  }

  function explainLine(p, { kind, fates, bounds, constants }) {
    if (kind === "stationary") return [`Nothing moves: dx/dt = μ x w, and ${p.mu === 0 ? "μ = 0" : "all tokens are 0"}.`];
    if (kind === "convergence") {
      return [
        `μ = ${number(p.mu)} < 0: every token keeps its sign and shrinks to 0 like t^(-1/2), and the hidden attention like 1/t (Theorem 4.1).`,
        `|x| √t tends to ${number(constants[0])} for the first token and to ${number(Math.min(...constants.filter((c) => c > 0)))} for later ones, wherever they start.`,
      ];
    }
    if (kind === "slow divergence") {
      return [
        `μ = ${number(p.mu)} > 0 and S_Δ x < 0 for every token: each |x| grows without bound, in infinite time, and the hidden attention goes to 0 (Lemma 4.2, Theorem 4.3).`,
        "As a token grows its step size Δ falls, so it grows like ln t and no faster; tokens differ in the constant before ln t, not in the power.",
      ];
    }
    const own = fates.map((fate, l) => l).filter((l) => p.sDelta * p.x0[l] > 0 || (p.sDelta === 0 && p.x0[l] !== 0));
    const first = fates.indexOf("blow-up"), parts = [
      `μ = ${number(p.mu)} > 0 and ${p.sDelta === 0 ? "S_Δ = 0" : `S_Δ x > 0 for ${list(own)}`}: growing makes Δ larger, and ${own.length > 1 ? "one of them" : "it"} goes to infinity before t = ${number(bounds[bounds.length - 1])} (Theorem 4.4).`,
      "When a token blows up so does every later one that is not 0; tokens before it do not feel it. Of its row of the hidden attention only the diagonal diverges.",
    ];
    if (first > 0) parts.push(`${first > 1 ? `Tokens 1 to ${first} live` : "Token 1 lives"} on and grow${first > 1 ? "" : "s"} like ln t.`);
    return parts;
  }

  /* Tokens in the plane: what can be proved is proved, the rest is simulated. */
  function classifyPlane(p) {
    const one = shared(p), s = [p.M[0][0], (p.M[0][1] + p.M[1][0]) / 2, p.M[1][1]];
    const centre = (s[0] + s[2]) / 2, radius = Math.hypot((s[0] - s[2]) / 2, s[1]), low = centre - radius, high = centre + radius;
    const fates = p.x0.map((x) => (norm(x) === 0 ? "stationary" : "undecided")), explanation = [], proved = new Set();
    fates.forEach((fate, l) => { if (fate === "stationary") proved.add(l); });
    if (one && high < 0 && p.M[0][1] === p.M[1][0]) {
      fates.forEach((fate, l) => { proved.add(l); if (fate === "undecided") fates[l] = "convergence"; });
      explanation.push(`M is symmetric and negative definite (largest eigenvalue ${number(high)}) and all channels share Δ: every token goes to 0 like t^(-1/2).`);
    } else if (fates[0] === "undecided") {
      const [fate, why] = firstToken(p, one, low, high);
      if (fate) { fates[0] = fate; proved.add(0); }
      explanation.push(why);
    }
    const open = fates.map((_, l) => l).filter((l) => !proved.has(l));
    if (open.length) {
      const from = simulateFates(p, fates);
      explanation.push(`No proof covers ${list(open)}: a simulation to t = ${number(from)} shows ${open.map((l) => fates[l]).join(", ")}.`);
    }
    explanation.push(`Eigenvalues of (M + Mᵀ)/2: ${number(low)} and ${number(high)}. Their signs alone do not decide; the sign of x₁ᵀ M x₁ along the path does.`);
    const moving = fates.filter((fate) => fate !== "stationary"), falling = moving.filter((fate) => fate === "convergence").length;
    const kind = !moving.length ? "stationary" : moving.includes("undecided") ? "undecided" : falling === moving.length ? "convergence"
      : falling ? "mixed" : moving.some((fate) => fate !== "slow divergence") ? "fast divergence" : "slow divergence";
    return { kind, fates, certainty: open.length ? "simulated" : "derived", explanation };
  }

  function firstToken(p, one, low, high) {
    const x = p.x0[0], value = form(p.M, x) / dot(x, x);
    if (value === 0) return ["stationary", "Token 1 stays where it is, since x₁ᵀ M x₁ = 0."];
    if (one) {
      const pull = dot(typeof p.sDelta[0] === "number" ? p.sDelta : p.sDelta[0], x);
      const [fate, how] = value < 0 ? ["convergence", "goes to 0 like t^(-1/2)"] : pull < 0 ? ["slow divergence", "grows like ln t"] : ["blow-up", "blows up in finite time"];
      return [fate, `Token 1 keeps its direction, for all channels share Δ, and ${how}: it is a token of the line with μ = x₁ᵀ M x₁ / |x₁|² = ${number(value)}.`];
    }
    const present = [0, 1].filter((d) => x[d] !== 0);
    const oriented = (d, e) => (p.M[d][e] + p.M[e][d]) * Math.sign(x[d]) * Math.sign(x[e]);
    const all = (test) => present.every((d) => present.every((e) => test(oriented(d, e)) && (d !== e || oriented(d, d) !== 0)));
    if (high < 0 || all((v) => v <= 0)) return ["convergence", "Token 1 goes to 0, for xᵀ M x < 0 in its whole quadrant, which it does not leave."];
    if (low > 0 || all((v) => v >= 0)) return [null, "Token 1 goes to infinity, for xᵀ M x > 0 in its whole quadrant; how fast is simulated."];
    return [null, `Token 1 ${value < 0 ? "shrinks" : "grows"} at first (x₁ᵀ M x₁ / |x₁|² = ${number(value)}); its direction turns, for each channel has its own Δ, and the sign may change.`];
  }

  /* Enter what the undecided tokens are seen to do into fates; the time looked up to. */
  function simulateFates(p, fates) {
    const moved = flow(p, p.x0), rate = Math.max(...p.x0.map((x, l) => (norm(x) > 0 ? norm(moved[l]) / norm(x) : 0)));
    const looks = [1e3 / rate, 1e6 / rate], trajectory = simulate(p, looks[1], { rtol: 1e-6, maxSteps: 2000 });
    fates.forEach((fate, l) => {
      if (fate !== "undecided") return;
      if (trajectory.endedBy[l] === l) fates[l] = "blow-up";
      else if (trajectory.endedBy[l] >= 0) fates[l] = "ended";
      else if (trajectory.reason === "reached t_end") {
        const early = norm(trajectory.at(looks[0])[l]), late = norm(trajectory.at(looks[1])[l]);
        if (late < 0.1 * early) fates[l] = "convergence";
        else if (late > 1.02 * early) fates[l] = "slow divergence";
      }
    });
    return trajectory.stoppedAt;
  }

  /* Σ_{j<l} Δ_j exp(-a Σ_{k=j+1..l} Δ_k) for every l. */
  function earlierWeights(deltas, a) {
    const sums = [0];
    for (let l = 1; l < deltas.length; l++) sums.push(Math.exp(-a * deltas[l]) * (sums[l - 1] + deltas[l - 1]));
    return sums;
  }

  /* Tokens on the sphere: case A, one Δ for all channels; case B, a Δ per channel. */
  function classifySphere(p) {
    return shared(p) ? sharedSphere(p) : channelSphere(p);
  }

  /* At which of ± limit each token is at the end of the simulation; 0 where at neither. */
  function arrivals(p, limit, tEnd) {
    const trajectory = simulate(p, tEnd, { rtol: 1e-8, maxSteps: 5000 }), end = trajectory.at(trajectory.stoppedAt);
    const signs = end.map((x) => { const along = dot(x, limit); return Math.abs(Math.abs(along) - 1) < 1e-4 ? Math.sign(along) : 0; });
    return { signs, first: end[0] };
  }
  const gathered = (signs) => {
    const minus = signs.map((_, l) => l).filter((l) => signs[l] < 0);
    return minus.length ? `The tokens gather, ${list(minus)} at the opposite point.` : "The tokens gather, all at one point.";
  };

  function sharedSphere(p) {
    const x1 = p.x0[0], m = form(p.M, x1), L = p.x0.length, plus = new Array(L).fill(1);
    const rates = (signs) => earlierWeights(signs.map((s) => steps(p, x1.map((v) => s * v))[0]), p.a).map((w) => m * w);
    const lead = `One Δ for all channels: token 1 does not move, and m = x₁ᵀ M x₁ = ${number(m)} decides.`;
    if (m <= 0) {
      const kind = m < 0 ? "repulsion" : "undecided";
      const tail = m < 0 ? "m < 0: it drives the others away; token 2 goes to the plane xᵀ M x₁ = 0." : "m = 0 decides nothing.";
      return { kind, rates: rates(plus), signs: plus.map((_, l) => (l ? 0 : 1)), certainty: "derived", explanation: [lead, tail] };
    }
    if (L === 1) return { kind: "stationary", rates: [0], signs: [1], certainty: "derived", explanation: [lead] };
    const certain = L === 2 && form(p.M, p.x0[1], x1) !== 0;
    const signs = certain ? [1, Math.sign(form(p.M, p.x0[1], x1))] : arrivals(p, x1, 40 / Math.min(...rates(plus).slice(1))).signs;
    const kind = signs.includes(0) ? "undecided" : "consensus", kappa = rates(signs);
    const tail = kind === "consensus" ? `m > 0: the others come to ± token 1. ${gathered(signs)} Token 2 arrives like exp(-${number(kappa[1])} t).`
      : "m > 0: the others come to ± token 1 from almost every start, but not all have arrived in the time simulated.";
    return { kind, rates: kappa, signs, certainty: certain ? "derived" : "simulated", explanation: [lead, tail] };
  }

  function channelSphere(p) {
    const D = p.M.length, L = p.x0.length, poles = [];
    const unit = (nu, sign) => Array.from({ length: D }, (_, d) => (d === nu ? sign : 0));
    const others = (nu) => Array.from({ length: D }, (_, d) => d).filter((d) => d !== nu);
    for (let nu = 0; nu < D; nu++) {
      for (const sign of [1, -1]) {
        const delta = steps(p, unit(nu, sign)), eigenvalues = others(nu).map((d) => -p.M[nu][nu] * (delta[nu] - delta[d]));
        poles.push({ nu, sign, name: `${sign > 0 ? "+" : "−"}e${"₁₂₃"[nu]}`, eigenvalues, stable: Math.max(...eigenvalues) < 0 });
      }
    }
    const stable = poles.filter((pole) => pole.stable);
    const lead = "A Δ per channel: token 1 moves too, and is drawn to a pole ±e_ν with M_νν > 0 and the largest Δ there, or M_νν < 0 and the smallest.";
    const names = `Stable poles here: ${stable.map((pole) => pole.name).join(", ") || "none"}.`;
    const unknown = { kind: "undecided", rates: new Array(L).fill(NaN), signs: new Array(L).fill(0), certainty: "simulated", stable: stable.map(({ nu, sign }) => [nu, sign]) };
    if (!stable.length) return { ...unknown, explanation: [lead, names] };
    const slowest = Math.min(...stable.map((pole) => -Math.max(...pole.eigenvalues)));
    const { first } = arrivals(p, unit(0, 1), 40 / slowest);
    const limit = stable.reduce((best, pole) => (dot(first, unit(pole.nu, pole.sign)) > dot(first, unit(best.nu, best.sign)) ? pole : best));
    const point = unit(limit.nu, limit.sign);
    if (norm(first.map((v, d) => v - point[d])) > 1e-2) return { ...unknown, explanation: [lead, names, "Token 1 has not arrived at one in the time simulated."] };
    const { signs } = arrivals(p, point, 40 / slowest);
    if (signs.includes(0)) return { ...unknown, signs, explanation: [lead, names, `Token 1 arrives at ${limit.name}; not all others have in the time simulated.`] };
    const deltas = signs.map((s) => steps(p, point.map((v) => s * v)));
    const weights = earlierWeights(deltas.map((delta) => delta[limit.nu]), p.a);
    const rates = deltas.map((delta, l) => Math.min(...others(limit.nu).map((d) => p.M[limit.nu][limit.nu] * (delta[limit.nu] - delta[d] + weights[l]))));
    return { ...unknown, kind: "consensus", rates, signs, explanation: [lead, names, `Token 1 arrives at ${limit.name}. ${gathered(signs)}`] };
  }

  const classify = (p) => (p.space === "line" ? classifyLine(p) : p.space === "plane" ? classifyPlane(p) : classifySphere(p));
  return { classify, number };
})();

if (typeof module !== "undefined") module.exports = TokenRegimes;
