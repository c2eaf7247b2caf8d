// The mathematics of explorer.html: teacher, policies, rollout, pi-ID. No drawing here.
// Each function says which Python function it mirrors; tests/test_explorer.py compares them.
// t = 1 is noise, t = 0 is data. The shift is 1, so tau = t. A point is an array [x, y].
"use strict";

const EPS = 1e-6;
const add = (a, b) => [a[0] + b[0], a[1] + b[1]];
const subtract = (a, b) => [a[0] - b[0], a[1] - b[1]];
const scale = (s, a) => [s * a[0], s * a[1]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
const sum = (values) => values.reduce((total, value) => total + value, 0);
const mix = (a, b, share) => add(scale(1 - share, a), scale(share, b));
const mixture = (weights, points) =>
  [sum(points.map((p, k) => weights[k] * p[0])), sum(points.map((p, k) => weights[k] * p[1]))];

function softmax(logits) {
  const most = Math.max(...logits);
  const parts = logits.map((l) => Math.exp(l - most));
  const total = sum(parts);
  return parts.map((p) => p / total);
}

// common.teachers.endpoint_rmse, of one point: over its two coordinates.
function rmse(a, b) {
  const error = subtract(a, b);
  return Math.sqrt(dot(error, error) / 2);
}

// ==== The teacher: toy_2d.Checkerboard ===========================================================
// Data: uniform on eight of the sixteen unit squares of [-2, 2]^2. E[x_0 | x_t] has a closed form.

const CENTERS = [-1.5, -0.5, 0.5, 1.5]; // of the intervals of an axis
const SQUARES = []; // [ix, iy] of the filled ones
for (let ix = 0; ix < 4; ix++) {
  for (let iy = 0; iy < 4; iy++) if ((ix + iy) % 2 === 0) SQUARES.push([ix, iy]);
}
const SQUARE_CENTERS = SQUARES.map(([ix, iy]) => [CENTERS[ix], CENTERS[iy]]);
const QUADRATURE = [ // Gauss-Legendre, 8 points: [node, weight]
  [0.1834346424956498, 0.3626837833783620], [0.5255324099163290, 0.3137066458778873],
  [0.7966664774136267, 0.2223810344533745], [0.9602898564975363, 0.1012285362903763],
].flatMap(([node, weight]) => [[node, weight], [-node, weight]]);

// torch.special.erfcx: exp(y^2) erfc(y). A series near 0, a continued fraction beyond 2.
function erfcx(y) {
  if (y < 0) return 2 * Math.exp(y * y) - erfcx(-y);
  if (y > 2) {
    let fraction = y;
    for (let n = 40; n > 0; n--) fraction = y + n / 2 / fraction;
    return 1 / (Math.sqrt(Math.PI) * fraction);
  }
  let term = y;
  let series = y; // sum of 2^n y^(2n+1) / (1 3 5 ... (2n+1))
  for (let n = 1; n < 40; n++) {
    term *= 2 * y * y / (2 * n + 1);
    series += term;
  }
  return Math.exp(y * y) - 2 / Math.sqrt(Math.PI) * series;
}

// Checkerboard._intervals, for one coordinate: the posterior of x_0 = center + s/2 in each of the
// four intervals. -> for each: E[eps], E[s], and log evidence.
function intervals(x, t) {
  const k = (1 - t) / (2 * t);
  const wide = Math.max(k, EPS);
  return CENTERS.map((center) => {
    const z = (x - (1 - t) * center) / t;
    if (k < 0.25 && Math.abs(z * k) < 4) { // near t = 1: quadrature
      let total = 0;
      let moment = 0;
      for (const [node, weight] of QUADRATURE) {
        const part = weight / 2 * Math.exp(node * z * k - node * node / 2 * k * k);
        total += part;
        moment += node * part;
      }
      const offset = moment / total;
      return { center, eps: z - k * offset, offset, evidence: Math.log(total) - z * z / 2 };
    }
    const near = Math.max(Math.abs(z) - wide, -9); // mirrored to z >= 0
    const far = Math.abs(z) + wide;
    const gap = (far - near) * (far + near) / 2;
    const tail = Math.max(
      erfcx(near * Math.SQRT1_2) - Math.exp(-gap) * erfcx(far * Math.SQRT1_2), 1e-30);
    const eps = Math.sign(z) * Math.sqrt(2 / Math.PI) * -Math.expm1(-gap) / tail;
    const evidence = Math.log(Math.sqrt(Math.PI / 8) * tail / wide) - near * near / 2;
    return { center, eps, offset: (z - eps) / wide, evidence };
  });
}

// Checkerboard.velocity: u = E[eps | x] - E[x_0 | x], in the form of a policy. Its components are
// the eight squares. Each velocity stands for one call of the teacher's network.
const teacherPolicy = {
  name: "teacher",
  points: SQUARE_CENTERS,
  posterior(x, t) {
    const level = Math.max(t, EPS);
    const axes = x.map((coordinate) => intervals(coordinate, level));
    const weights = softmax(SQUARES.map(([ix, iy]) => axes[0][ix].evidence + axes[1][iy].evidence));
    return { axes, weights };
  },
  weights(x, t) {
    return this.posterior(x, t).weights;
  },
  velocity(x, t) {
    const { axes, weights } = this.posterior(x, t);
    const u = axes.map((axis) => axis.map((i) => i.eps - i.center - i.offset / 2));
    return mixture(weights, SQUARES.map(([ix, iy]) => [u[0][ix], u[1][iy]]));
  },
};

// ==== Policies: piflow_minimal.GMFlowPolicy and DXPolicy =========================================

// The network's output is a mixture over x_0 at (x_src, t_src): points m_k, variance var, weights
// A_k. Bayes' rule carries it to any later (x, t). GMFlowPolicy's docstring derives the lines:
//   zeta = (alpha/t)^2 - (alpha_src/t_src)^2      nu = alpha x/t^2 - alpha_src x_src/t_src^2
//   d = 1 + var zeta                              w_k = softmax_k(log A_k + m_k (nu - zeta m_k/2)/d)
//   x0 = (var nu + sum_k w_k m_k) / d             pi(x, t) = (x - x0)/t
function gmflowPolicy(points, logweights, logstd, xSrc, tSrc) {
  const variance = (tSrc * Math.exp(logstd)) ** 2;
  const bayes = (x, tGiven) => {
    const t = Math.max(tGiven, EPS);
    const zeta = ((1 - t) / t) ** 2 - ((1 - tSrc) / tSrc) ** 2;
    const nu = subtract(scale((1 - t) / t ** 2, x), scale((1 - tSrc) / tSrc ** 2, xSrc));
    const d = Math.max(1 + variance * zeta, EPS);
    const logits = points.map((m, k) => logweights[k] + (dot(m, nu) - zeta * dot(m, m) / 2) / d);
    return { t, zeta, nu, d, weights: softmax(logits) };
  };
  return {
    name: "gmflow", points, logweights, logstd, variance, xSrc, tSrc, bayes,
    weights: (x, t) => bayes(x, t).weights,
    velocity(x, tGiven) {
      const { t, nu, d, weights } = bayes(x, tGiven);
      const x0 = scale(1 / d, add(scale(variance, nu), mixture(weights, points)));
      return scale(1 / t, subtract(x, x0));
    },
  };
}

// x0_hat(t) interpolates N points, at equal distances of t on [tEnd, t_src], whatever x is:
//   pi(x, t) = (x - x0_hat(t))/t
function dxPolicy(points, xSrc, tSrc, segmentSize) {
  const n = points.length;
  const tEnd = Math.max(tSrc - segmentSize, 0);
  const length = Math.max(tSrc - tEnd, EPS);
  const weights = (x, t) => { // of linear interpolation
    const place = Math.min(Math.max((t - tEnd) / length, 0), 1) * (n - 1);
    return points.map((_, i) => Math.max(0, 1 - Math.abs(place - i)));
  };
  const x0Hat = (t) => mixture(weights(null, t), points);
  return {
    name: "dx", points, xSrc, tSrc, weights, x0Hat,
    velocity: (x, t) => scale(1 / Math.max(t, EPS), subtract(x, x0Hat(t))),
    // DXPolicy.flow: the exact solution. d(x/t)/dt = -x0_hat/t^2, by parts over the linear pieces:
    // x' = t'/t x + t' (x0_hat(t')/t' - x0_hat(t)/t + sum_j slope_j log(upper_j/lower_j))
    flow(x, tFrom, tTo) {
      const t = Math.max(tFrom, EPS);
      const tNext = Math.max(tTo, EPS);
      let integral = subtract(scale(1 / tNext, x0Hat(tNext)), scale(1 / t, x0Hat(t)));
      for (let j = 0; j + 1 < n; j++) {
        const [lower, upper] = [j, j + 1].map((i) =>
          Math.max(Math.min(tEnd + i / (n - 1) * length, t), tNext));
        const slope = scale((n - 1) / length, subtract(points[j + 1], points[j]));
        integral = add(integral, scale(Math.log(upper / lower), slope));
      }
      return add(scale(tNext / t, x), scale(tNext, integral));
    },
  };
}

// ==== The student's network: toy_2d.Student ======================================================

// A safetensors file in base64 -> { config, tensors: name -> { shape, values } }.
function readSafetensors(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const headerLength = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + headerLength)));
  const tensors = {};
  const config = JSON.parse(header.__metadata__.config);
  delete header.__metadata__;
  for (const [name, { shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const raw = bytes.slice(8 + headerLength + from, 8 + headerLength + to);
    tensors[name] = { shape, values: new Float32Array(raw.buffer) };
  }
  return { config, tensors };
}

function linear(tensors, name, input) {
  const weight = tensors[name + ".weight"];
  const bias = tensors[name + ".bias"];
  const [rows, columns] = weight.shape;
  return Array.from({ length: rows }, (_, row) => {
    let total = bias.values[row];
    for (let i = 0; i < columns; i++) total += weight.values[row * columns + i] * input[i];
    return total;
  });
}

// Student.forward: one evaluation of the network at (x_src, t_src). -> a policy.
function evaluateNetwork(student, xSrc, tSrc) {
  const { config, tensors } = student;
  const input = [...xSrc, tSrc];
  const columns = config.frequencies;
  const waves = Array.from({ length: columns }, (_, j) =>
    sum(input.map((value, i) => value * tensors.frequencies.values[i * columns + j])));
  let hidden = [...input, ...waves.map(Math.sin), ...waves.map(Math.cos)];
  for (let layer = 0; layer < config.depth; layer++) {
    hidden = linear(tensors, `body.${2 * layer}`, hidden).map((h) => h / (1 + Math.exp(-h)));
  }
  const output = linear(tensors, "head", hidden);
  const n = config.components;
  const points = Array.from({ length: n }, (_, k) => [output[2 * k], output[2 * k + 1]]);
  if (config.policy === "dx") return dxPolicy(points, xSrc, tSrc, 1);
  const logweights = output.slice(2 * n, 3 * n);
  return gmflowPolicy(points, logweights, Math.log(0.3) + output[3 * n], xSrc, tSrc);
}

// ==== Rollout: piflow_minimal.rollout and sample =================================================

// -> the states [{ t, x }, ...] from tStart to tEnd, both included. No network evaluation.
//   euler  x' = x + (t' - t) pi(x, t), substeps uniform in t
//   deis   adds b (t' log(t/t') + t' - t), b the slope of x_0 in t; substeps uniform in t^(1/1.5)
//   exact  the policy's flow: any number of substeps gives the same states
function rollout(policy, x, tStart, tEnd, totalSubsteps, solver) {
  const power = solver === "deis" ? 1.5 : 1;
  const n = Math.max(1, Math.ceil((tStart - tEnd) * totalSubsteps - 1e-4));
  const [zStart, zEnd] = [tStart ** (1 / power), tEnd ** (1 / power)];
  const times = Array.from({ length: n + 1 }, (_, i) =>
    i === n ? tEnd : (zStart + (zEnd - zStart) * i / n) ** power);
  const states = [{ t: tStart, x }];
  let x0Before = x;
  for (let i = 0; i < n; i++) {
    const t = times[i];
    const step = times[i + 1] - t;
    if (solver === "exact") {
      x = policy.flow(x, t, times[i + 1]);
    } else {
      const u = policy.velocity(x, t);
      const x0 = subtract(x, scale(t, u));
      x = add(x, scale(step, u));
      if (solver === "deis" && i > 0) {
        const reached = Math.max(times[i + 1], EPS);
        const bend = reached * Math.log(Math.max(t, EPS) / reached) + step;
        const slope = scale(1 / Math.min(t - times[i - 1], -1e-4), subtract(x0, x0Before));
        x = add(x, scale(bend, slope));
      }
      x0Before = x0;
    }
    states.push({ t: times[i + 1], x });
  }
  return states;
}

// piflow_minimal.sample: a new policy at the start of each of nfe equal segments, a rollout in each.
// makePolicy(x, t) is one network evaluation. push { t, by } displaces the state at level t.
// -> [{ policy, tEnd, states }, ...], one for each segment.
function sample(makePolicy, noise, nfe, totalSubsteps, solver, push = null) {
  const segments = [];
  let x = noise;
  for (let i = 0; i < nfe; i++) {
    const [tStart, tEnd] = [1 - i / nfe, 1 - (i + 1) / nfe];
    const states = [];
    if (push?.t === tStart) { // the network sees this push
      states.push({ t: tStart, x });
      x = add(x, push.by);
    }
    const policy = makePolicy(x, tStart);
    let t = tStart;
    if (push && push.t < tStart && push.t > tEnd) { // only the policy sees this one
      states.push(...rollout(policy, x, tStart, push.t, totalSubsteps, solver));
      x = add(states[states.length - 1].x, push.by);
      t = push.t;
    }
    states.push(...rollout(policy, x, t, tEnd, totalSubsteps, solver));
    segments.push({ policy, tEnd, states });
    x = states[states.length - 1].x;
  }
  return segments;
}

// The state at level t, on the straight line between two neighbours of a list of states.
function stateAt(states, t) {
  const next = states.findIndex((state) => state.t < t);
  if (next < 1) return next === 0 ? states[0].x : states[states.length - 1].x;
  const [a, b] = [states[next - 1], states[next]];
  return mix(a.x, b.x, (a.t - t) / (a.t - b.t));
}

// ==== pi-ID on a static policy: common/static_policy.py ==========================================

// mulberry32: draws in [0, 1) that are the same on every machine.
function uniformDraws(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let h = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    h = (h + Math.imul(h ^ (h >>> 7), 61 | h)) ^ h;
    return ((h ^ (h >>> 14)) >>> 0) / 4294967296;
  };
}

// StaticPolicy: parameters in place of a network, at t_src = 1. Flat: K velocities, K log weights,
// one log std. The velocities start around the teacher's at the noise.
function startStatic(xSrc, components, draw) {
  const normal = () => Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
  const u = teacherPolicy.velocity(xSrc, 1);
  const means = Array.from({ length: 2 * components }, (_, i) => u[i % 2] + 0.5 * normal());
  return [...means, ...Array(components).fill(0), Math.log(0.3)];
}

function staticPolicy(parameters, xSrc) {
  const components = (parameters.length - 1) / 3;
  const points = Array.from({ length: components }, (_, k) =>
    subtract(xSrc, parameters.slice(2 * k, 2 * k + 2)));
  const logweights = parameters.slice(2 * components, 3 * components);
  return gmflowPolicy(points, logweights, parameters[3 * components], xSrc, 1);
}

// The loss at queries [{ x, t, u }], the mean of t^power (pi(x, t) - u)^2, and its gradient by
// hand. With g = dloss/dx0 and e_k = dloss/dlogit_k = w_k g (m_k - sum w m)/d:
//   dloss/dm_k = w_k g/d + e_k (nu - zeta m_k)/d         dloss/dlog A_k = e_k
//   dloss/dvar = g (nu - zeta x0)/d - zeta/d sum_k e_k (logit_k - log A_k)
function lossAndGradient(parameters, xSrc, queries, power) {
  const policy = staticPolicy(parameters, xSrc);
  const components = policy.points.length;
  const gradient = Array(parameters.length).fill(0);
  const count = 2 * queries.length; // entries of the mean
  let loss = 0;
  for (const { x, t, u } of queries) {
    const error = subtract(policy.velocity(x, t), u);
    loss += t ** power * dot(error, error) / count;
    const g = scale(-2 * t ** power / (count * t), error); // through pi = (x - x0)/t
    const { zeta, nu, d, weights } = policy.bayes(x, t);
    const mean = mixture(weights, policy.points);
    const x0 = scale(1 / d, add(scale(policy.variance, nu), mean));
    let byVariance = dot(g, subtract(nu, scale(zeta, x0))) / d;
    policy.points.forEach((m, k) => {
      const e = weights[k] * dot(g, subtract(m, mean)) / d;
      const byPoint = add(scale(weights[k] / d, g), scale(e / d, subtract(nu, scale(zeta, m))));
      gradient[2 * k] -= byPoint[0]; // m_k = x_src - mu_k
      gradient[2 * k + 1] -= byPoint[1];
      gradient[2 * components + k] += e;
      byVariance -= zeta / d * e * (dot(m, nu) - zeta * dot(m, m) / 2) / d;
    });
    gradient[3 * components] += byVariance * 2 * policy.variance; // var = std^2
  }
  return { loss, gradient };
}

// piflow_minimal.pi_id_loss (Algorithm 1): the detached policy is rolled out, the teacher is queried
// at states that it visits, one in each M-th of them (not at the end: nothing is evaluated there).
function queryTeacher(policy, substeps, intermediates, draw) {
  const visited = rollout(policy, policy.xSrc, 1, 0, substeps, "deis").slice(0, -1);
  const share = visited.length / intermediates;
  return Array.from({ length: intermediates }, (_, m) => {
    const { x, t } = visited[Math.floor((m + draw()) * share)];
    return { x, t, u: teacherPolicy.velocity(x, t) };
  });
}

function startTraining(xSrc, components, iterations, seed = 0) {
  const draw = uniformDraws(seed);
  const parameters = startStatic(xSrc, components, draw);
  const zeros = () => Array(parameters.length).fill(0);
  return { xSrc, draw, parameters, iterations, done: 0, losses: [], first: zeros(), second: zeros() };
}

// One iteration of pi-ID with torch.optim.Adam; the loss is weighted by t, the rate falls to 0.
function trainStep(run) {
  const queries = queryTeacher(staticPolicy(run.parameters, run.xSrc), 16, 4, run.draw);
  const { loss, gradient } = lossAndGradient(run.parameters, run.xSrc, queries, 1);
  const rate = 0.1 * (1 + Math.cos(Math.PI * run.done / run.iterations)) / 2;
  const [beta1, beta2] = [0.9, 0.99];
  run.done += 1;
  run.losses.push(loss);
  gradient.forEach((g, i) => {
    run.first[i] += (1 - beta1) * (g - run.first[i]);
    run.second[i] += (1 - beta2) * (g * g - run.second[i]);
    const momentum = run.first[i] / (1 - beta1 ** run.done);
    const size = Math.sqrt(run.second[i] / (1 - beta2 ** run.done));
    run.parameters[i] -= rate * momentum / (size + 1e-8);
  });
}
