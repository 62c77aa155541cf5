/* The token dynamics in plain JavaScript: right-hand sides, hidden attention, and an integrator.

   The equations are those of tokendyn.core, which a test compares with this file. A problem is an object

     { space: "line",   mu, sDelta, a, bias, x0: [x_1, ..., x_L] }
     { space: "plane",  M, sDelta, a, bias, x0: [[...], ...] }      tokens in R^D
     { space: "sphere", M, sDelta, a, bias, x0: [[...], ...] }      tokens of unit norm

   with M an array of D rows, sDelta D numbers (one step size for all channels) or D rows (one a channel). */
"use strict";

const TokenDynamics = (() => {
  const softplus = (v) => (v > 0 ? v + Math.log1p(Math.exp(-v)) : Math.log1p(Math.exp(v)));
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const apply = (M, x) => M.map((row) => dot(row, x));
  const norm = (x) => Math.sqrt(dot(x, x));
  const form = (M, x, y = x) => dot(x, apply(M, y));
  const shared = (p) => typeof p.sDelta[0] === "number" || p.sDelta.every((row) => row.every((v, i) => v === p.sDelta[0][i]));

  /* Step sizes Δ_d(x) of one token, one a channel. */
  function steps(p, x) {
    if (p.space === "line") return [softplus(p.sDelta * x + p.bias)];
    if (typeof p.sDelta[0] === "number") return x.map(() => softplus(dot(p.sDelta, x) + p.bias));
    return p.sDelta.map((row) => softplus(dot(row, x) + p.bias));
  }

  /* On the line dx_l/dt = μ x_l w_l with w_l = exp(-a Δ_l) w_{l-1} + x_l² Δ_l: the rates μ w_l of ln|x_l|. */
  function lineRates(p, x) {
    let w = 0;
    return x.map((value) => {
      const step = softplus(p.sDelta * value + p.bias);
      w = Math.exp(-p.a * step) * w + value * value * step;
      return value === 0 ? 0 : p.mu * w;
    });
  }

  /* dx_{dl}/dt = Σ_{j≤l} P_{dlj} x_{dj} as one scan: h_l = exp(-a Δ_l) h_{l-1} + Δ_l (M x_l) x_{dl}, out = x_lᵀ h_l. */
  function flow(p, x) {
    if (p.space === "line") return lineRates(p, x).map((rate, l) => rate * x[l]);
    const D = p.M.length, h = Array.from({ length: D }, () => new Array(D).fill(0));
    return x.map((token) => {
      const delta = steps(p, token), B = apply(p.M, token);
      const out = h.map((state, d) => {
        const decay = Math.exp(-p.a * delta[d]);
        for (let n = 0; n < D; n++) state[n] = decay * state[n] + delta[d] * B[n] * token[d];
        return dot(token, state);
      });
      if (p.space !== "sphere") return out;
      const along = dot(token, out);
      return out.map((v, d) => v - along * token[d]); // (I - x xᵀ) out
    });
  }

  /* P_{dlj} = (x_lᵀ M x_j) Δ_d(x_j) exp(-a Σ_{k=j+1..l} Δ_d(x_k)), j ≤ l: one matrix on the line, else one a channel. */
  function attention(p, x) {
    const delta = x.map((token) => steps(p, token));
    const P = delta[0].map((_, d) => x.map((row, l) => {
      const out = new Array(x.length).fill(0);
      for (let j = l, elapsed = 0; j >= 0; elapsed += delta[j][d], j--) {
        const score = p.space === "line" ? p.mu * row * x[j] : form(p.M, row, x[j]);
        out[j] = score * delta[j][d] * Math.exp(-p.a * elapsed);
      }
      return out;
    }));
    return p.space === "line" ? P[0] : P;
  }

  // Dormand and Prince's pair of order 5(4), and the coefficients of its dense output.
  const STAGES = [
    [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
  ];
  const ERRORS = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40];
  const DENSE = [-12715105075 / 11282082432, 0, 87487479700 / 32700410799, -10690763975 / 1880347072,
    701980252875 / 199316789632, -1453857185 / 822651844, 69997945 / 29380423];

  const combine = (y, slopes, weights, step) =>
    y.map((value, i) => value + step * weights.reduce((sum, weight, s) => sum + weight * slopes[s][i], 0));

  /* Tokens from depth 0 to tEnd.

     Time is the first component of the state and runs on the clock dt/dσ = 1/(1/(t + t0) + ρ), ρ the size of the
     positive growth rates: logarithmic for long times, and a blow-up lies at σ = ∞. On the line the state is ln|x|.
     When token l blows up it ends, and with it all later ones, whose equations hold it; earlier ones go on.

     Returns times, at(t): the tokens that are still there, endedAt and endedBy a token, and reason. */
  function simulate(p, tEnd, { rtol = 1e-9, maxSteps = 4000 } = {}) {
    const line = p.space === "line", sphere = p.space === "sphere", L = p.x0.length, D = line ? 1 : p.M.length;
    const signs = line ? p.x0.map(Math.sign) : null;
    const unpack = (y) => {
      const x = [];
      for (let i = 1; i < y.length; i += D) x.push(line ? (signs[i - 1] === 0 ? 0 : signs[i - 1] * Math.exp(y[i])) : y.slice(i, i + D));
      return x;
    };
    const growth = (y, dy, l) => {
      if (line) return dy[1 + l];
      const x = y.slice(1 + l * D, 1 + (l + 1) * D), dx = dy.slice(1 + l * D, 1 + (l + 1) * D), square = dot(x, x);
      return square > 0 ? dot(x, dx) / square : 0;
    };
    const size = (y, dy, l) => {
      if (line) return Math.abs(dy[1 + l]);
      const square = norm(y.slice(1 + l * D, 1 + (l + 1) * D));
      return square > 0 ? norm(dy.slice(1 + l * D, 1 + (l + 1) * D)) / square : 0;
    };
    const count = (y) => (y.length - 1) / D;
    const most = (y, dy, measure) => {
      let largest = 0;
      for (let l = 0; l < count(y); l++) largest = Math.max(largest, measure(y, dy, l));
      return largest;
    };
    let scale = 1;
    const slope = (y) => {
      const x = unpack(y), raw = line ? lineRates(p, x) : flow(p, x).flat();
      if (sphere) return [1, ...raw];
      let squares = 0;
      for (let l = 0, dy = [0, ...raw]; l < x.length; l++) squares += Math.max(0, growth(y, dy, l)) ** 2;
      const pace = 1 / (1 / (y[0] + scale) + Math.sqrt(squares));
      return [pace, ...raw.map((v) => v * pace)];
    };

    let y = [0, ...(line ? p.x0.map((x) => (x === 0 ? 0 : Math.log(Math.abs(x)))) : p.x0.flat())];
    const endedAt = new Array(L).fill(Infinity), endedBy = new Array(L).fill(-1), pieces = [];
    const first = slope(y), fastest = most(y, first, size) / first[0];
    scale = fastest > 0 ? 1 / fastest : tEnd;
    let k = slope(y), step = 0.1 / Math.max(sphere ? 1 / tEnd : 1, most(y, k, size));
    let reason = "max_steps reached";
    for (let taken = 0; taken < maxSteps; ) {
      if (y[0] >= tEnd) { reason = "reached t_end"; break; }
      if (count(y) === 0) { reason = "all tokens ended"; break; }
      const slopes = [k];
      let end = y;
      for (const weights of STAGES) { end = combine(y, slopes, weights, step); slopes.push(slope(end)); }
      const off = combine(end.map(() => 0), slopes, ERRORS, step);
      let error = Math.abs(off[0]) / k[0];
      for (let l = 0; l < count(y); l++) {
        const i = 1 + l * D, reach = line ? 1 : Math.max(norm(y.slice(i, i + D)), norm(end.slice(i, i + D)));
        if (reach > 0) error = Math.max(error, norm(off.slice(i, i + D)) / reach);
      }
      error = Number.isFinite(error) && end.every(Number.isFinite) ? error / rtol : Infinity;
      if (error > 1) {
        step *= error === Infinity ? 0.1 : Math.max(0.2, 0.9 * error ** -0.2);
        if (step < 1e-14) { reason = "tolerance unreachable"; break; }
        continue;
      }
      taken++;
      pieces.push({ from: y, end, slopes, step });
      y = end;
      k = slopes[6];
      if (sphere) {
        y = y.slice();
        for (let i = 1; i < y.length; i += D) {
          const length = norm(y.slice(i, i + D));
          for (let d = 0; d < D; d++) y[i + d] /= length;
        }
        k = slope(y);
      }
      step *= error === 0 ? 6 : Math.min(6, 0.9 * error ** -0.2);
      if (sphere) { step = Math.min(step, Math.max(tEnd - y[0], 1e-12)); continue; }
      const largest = most(y, k, growth); // the e-folding time is k[0] / largest: is it below the resolution of t?
      if (largest > 0 && k[0] / largest <= 4e-16 * y[0]) {
        let l = 0;
        while (growth(y, k, l) < 1e-3 * largest) l++;
        for (let ended = l; ended < count(y); ended++) { endedAt[ended] = y[0]; endedBy[ended] = l; }
        y = y.slice(0, 1 + l * D);
        if (l) { k = slope(y); step = 0.1 / Math.max(1, most(y, k, size)); }
      }
    }

    /* The dense output of one piece at a share θ of its step. */
    const inside = ({ from, end, slopes, step: h }, theta, i) => {
      const rise = end[i] - from[i], bend = h * slopes[0][i] - rise;
      const last = rise - h * slopes[6][i] - bend, fine = h * DENSE.reduce((sum, weight, s) => sum + weight * slopes[s][i], 0);
      return from[i] + theta * (rise + (1 - theta) * (bend + theta * (last + (1 - theta) * fine)));
    };
    const at = (time) => {
      let low = 0, high = pieces.length - 1;
      if (high < 0) return p.x0;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (pieces[middle].end[0] < time) low = middle + 1; else high = middle;
      }
      const piece = pieces[low];
      let left = 0, right = 1;
      for (let i = 0; i < 60; i++) {
        const middle = (left + right) / 2;
        if (inside(piece, middle, 0) < time) left = middle; else right = middle;
      }
      const alive = endedAt.filter((ended) => ended > time).length;
      return unpack(piece.from.map((_, i) => inside(piece, right, i))).slice(0, alive);
    };
    const stoppedAt = pieces.length ? Math.min(tEnd, pieces[pieces.length - 1].end[0]) : 0;
    const times = [0, ...pieces.map((piece) => piece.end[0]).filter((t) => t < stoppedAt), stoppedAt];
    return { times, at, endedAt, endedBy, reason, stoppedAt, steps: pieces.length };
  }

  return { softplus, dot, apply, norm, form, shared, steps, flow, attention, simulate };
})();

if (typeof module !== "undefined") module.exports = TokenDynamics;
