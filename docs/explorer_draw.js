// The drawing: colors, the plane, the charts. What is drawn follows from `state` and `scene`, which
// explorer_page.js makes.

// ==== Colors =====================================================================================

const theme = new Map(); // the style sheet's colors, read once
function themed(name) {
  if (!theme.has(name)) {
    theme.set(name, getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim());
  }
  return theme.get(name);
}
const policyColor = () => themed(state.policy);

// As common.plots.colors_of: left to right from blue to orange, bottom to top from dark to light.
const CORNERS = [[[0, 46, 115], [115, 194, 250]], [[140, 41, 5], [255, 189, 56]]];

function colorOf(point) {
  const [u, v] = point.map((c) => 1 / (1 + Math.exp(-1.4 * c)));
  const lift = document.documentElement.dataset.theme === "dark" ? 0.3 : 0; // towards white
  return [0, 1, 2].map((i) => {
    const left = (1 - v) * CORNERS[0][0][i] + v * CORNERS[0][1][i];
    const right = (1 - v) * CORNERS[1][0][i] + v * CORNERS[1][1][i];
    return Math.round((1 - lift) * ((1 - u) * left + u * right) + lift * 255);
  });
}
const css = (color, alpha = 1) => `rgb(${color.join(" ")} / ${alpha})`;

// ==== The plane ==================================================================================

function fitCanvas(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const [columns, rows] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, { width: columns, height: rows });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

const plane = { context: null, size: 1, unit: 1 }; // unit: a line width that grows with the plane
const toScreen = ([x, y]) =>
  [(x + LIMIT) / (2 * LIMIT) * plane.size, (LIMIT - y) / (2 * LIMIT) * plane.size];
const toPlane = (px, py) =>
  [(px / plane.size) * 2 * LIMIT - LIMIT, LIMIT - (py / plane.size) * 2 * LIMIT];

function drawPlane() {
  const { context, width } = fitCanvas(element("plane"));
  Object.assign(plane, { context, size: width, unit: Math.max(width / 560, 0.8) });
  const t = Number(state.t);
  const progress = STILL ? 1 : clamp((performance.now() - revealed) / 1200, 0, 1);
  drawBackground();
  if (dragged) {
    drawMarker(dragged, "circle", themed("ink"), 9);
    return progress;
  }
  const policy = policyAt(t);
  const x = stateAt(scene.states, t);
  drawShading(policy, t);
  drawArrows(policy, t);
  if (state.tool !== "query") drawComponents(policy, x, t, clamp((progress - 0.15) / 0.3, 0, 1));
  drawTrajectory(scene.teacher, themed("teacher"), 2.5, progress, [7, 5]);
  if (scene.unpushed) drawTrajectory(scene.unpushed, policyColor(), 1.2, 1, [2, 4]);
  drawTrajectory(scene.states, policyColor(), 3, clamp((progress - 0.4) / 0.4, 0, 1));
  if (Number(state.substeps) <= 16 && progress === 1) drawSubsteps();
  drawEnds(progress);
  if (state.tool === "query") drawQueries();
  else drawState(policy, x, t);
  if (scene.push) drawPush();
  if (progress < 0.45 && isStudent()) drawFlash(progress / 0.45);
  return progress;
}

const isStudent = () => state.policy === "gmflow" || state.policy === "dx";

function drawBackground() {
  plane.context.fillStyle = themed("paper");
  plane.context.fillRect(0, 0, plane.size, plane.size);
  drawData();
}

// The data: uniform on eight squares.
function drawData() {
  const { context } = plane;
  context.fillStyle = themed("data");
  for (const [cx, cy] of SQUARE_CENTERS) {
    const [left, top] = toScreen([cx - 0.5, cy + 0.5]);
    const side = plane.size / (2 * LIMIT);
    context.fillRect(left, top, side, side);
  }
}

// Each pixel in the color of the component that would win there, at this t.
const shading = { key: "", canvas: document.createElement("canvas") };

function drawShading(policy, t) {
  const cells = 90;
  const level = Math.max(t, 0.01);
  const key = [policy.name, policy.xSrc, level, training?.done, themed("paper")].join();
  if (shading.key !== key) {
    Object.assign(shading, { key });
    Object.assign(shading.canvas, { width: cells, height: cells });
    const context = shading.canvas.getContext("2d");
    const image = context.createImageData(cells, cells);
    const colors = policy.points.map(colorOf);
    for (let i = 0; i < cells * cells; i++) {
      const at = [(i % cells + 0.5) / cells, (Math.floor(i / cells) + 0.5) / cells];
      const weights = policy.weights([at[0] * 2 * LIMIT - LIMIT, LIMIT - at[1] * 2 * LIMIT], level);
      const winner = weights.indexOf(Math.max(...weights));
      image.data.set([...colors[winner], 56], 4 * i);
    }
    context.putImageData(image, 0, 0);
  }
  plane.context.imageSmoothingEnabled = true;
  plane.context.drawImage(shading.canvas, 0, 0, plane.size, plane.size);
}

// Arrows along -u: where a state at this t is about to move.
function drawArrows(policy, t) {
  const count = 15;
  const cell = plane.size / count;
  const level = Math.max(t, 0.01);
  for (let i = 0; i < count * count; i++) {
    const at = [(i % count + 0.5) * cell, (Math.floor(i / count) + 0.5) * cell];
    const u = policy.velocity(toPlane(...at), level);
    const speed = Math.hypot(...u);
    const reach = 0.42 * cell * Math.min(1, 0.25 + speed / 4) / Math.max(speed, 1e-9);
    const move = [-u[0] * reach, u[1] * reach];
    drawArrow(subtract(at, move), add(at, move), themed("muted"), 1.1 * plane.unit, 0.25 * cell);
  }
}

function drawArrow(from, to, color, width, head) {
  const { context } = plane;
  const angle = Math.atan2(to[1] - from[1], to[0] - from[0]);
  context.strokeStyle = color;
  context.lineWidth = width;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  for (const side of [-0.5, 0.5]) {
    context.moveTo(...to);
    context.lineTo(to[0] - head * Math.cos(angle + side), to[1] - head * Math.sin(angle + side));
  }
  context.stroke();
}

// Discs, their area the weight now. They unfold from the place where the network was called.
function drawComponents(policy, x, t, unfolded) {
  const { context } = plane;
  const weights = policy.weights(x, Math.max(t, EPS));
  const largest = 0.085 * plane.size;
  const places = policy.points.map((point) =>
    toScreen(policy.xSrc ? mix(policy.xSrc, point, unfolded) : point));
  if (policy.name === "dx") drawLine(places, themed("muted"), 1 * plane.unit, [2, 3]);
  places.forEach((place, k) => {
    context.beginPath();
    context.arc(...place, Math.max(largest * Math.sqrt(weights[k]), 2.2 * plane.unit), 0, 7);
    context.fillStyle = css(colorOf(policy.points[k]), 0.6);
    context.fill();
    context.lineWidth = 1.2 * plane.unit;
    context.strokeStyle = themed("ink");
    context.stroke();
  });
}

function drawLine(points, color, width, dash = []) {
  const { context } = plane;
  context.setLineDash(dash.map((length) => length * plane.unit));
  context.strokeStyle = color;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.beginPath();
  points.forEach((point, i) => (i ? context.lineTo(...point) : context.moveTo(...point)));
  context.stroke();
  context.setLineDash([]);
}

function drawTrajectory(states, color, width, progress, dash = []) {
  const shown = states.slice(0, Math.ceil(progress * (states.length - 1)) + 1);
  drawLine(shown.map((s) => toScreen(s.x)), themed("paper"), (width + 2.5) * plane.unit);
  drawLine(shown.map((s) => toScreen(s.x)), color, width * plane.unit, dash);
}

function drawSubsteps() {
  for (const { x } of scene.states) drawMarker(x, "circle", policyColor(), 3.5, true);
}

function drawMarker(x, shape, color, size, filled = false) {
  const { context } = plane;
  const [px, py] = toScreen(x);
  const r = size * plane.unit;
  context.beginPath();
  if (shape === "circle") context.arc(px, py, r, 0, 7);
  if (shape === "square") context.rect(px - r, py - r, 2 * r, 2 * r);
  if (shape === "diamond") {
    [[0, -1], [1, 0], [0, 1], [-1, 0]].forEach(([dx, dy]) => context.lineTo(px + r * dx, py + r * dy));
    context.closePath();
  }
  if (shape === "cross") {
    context.moveTo(px - r, py - r); context.lineTo(px + r, py + r);
    context.moveTo(px - r, py + r); context.lineTo(px + r, py - r);
    context.strokeStyle = themed("paper");
    context.lineWidth = 5 * plane.unit;
    context.stroke();
  } else {
    context.fillStyle = filled ? color : themed("paper");
    context.fill();
  }
  context.strokeStyle = filled ? themed("paper") : color;
  context.lineWidth = (filled ? 1 : 2.5) * plane.unit;
  context.stroke();
}

function drawEnds(progress) {
  for (const { policy } of scene.segments.slice(1)) drawMarker(policy.xSrc, "circle", policyColor(), 7);
  drawMarker(scene.noise, "circle", themed("ink"), 9);
  if (progress < 1) return;
  drawMarker(scene.teacher[scene.teacher.length - 1].x, "square", themed("teacher"), 6.5, true);
  drawMarker(scene.states[scene.states.length - 1].x, "circle", policyColor(), 5.5, true);
}

// The state at t, and the x_0 = x - t u that its velocity points at.
function drawState(policy, x, t) {
  const x0 = subtract(x, scale(t, policy.velocity(x, t)));
  drawLine([toScreen(x), toScreen(x0)], themed("ink"), 1.2 * plane.unit, [4, 3]);
  drawMarker(x0, "cross", themed("ink"), 6);
  drawMarker(x, "circle", themed("ink"), 6, true);
}

function drawQueries() {
  for (const t of QUERY_TIMES) drawMarker(stateAt(scene.queried, t), "diamond", themed("ink"), 6);
  if (!state.query) return;
  const { x, policy, teacher } = velocities(Number(state.query));
  const tips = [policy, teacher].map((u) => toScreen(subtract(x, scale(0.4, u))));
  const head = 12 * plane.unit;
  drawLine(tips, themed("ink"), 3 * plane.unit, [1, 4]);
  for (const [tip, color] of [[tips[1], themed("teacher")], [tips[0], policyColor()]]) {
    drawArrow(toScreen(x), tip, themed("paper"), 7 * plane.unit, head);
    drawArrow(toScreen(x), tip, color, 3.5 * plane.unit, head);
  }
  drawMarker(x, "diamond", themed("ink"), 7, true);
}

function drawPush() {
  const after = scene.teacher[0].x;
  const [from, to] = [subtract(after, scene.push.by), after].map(toScreen);
  drawArrow(from, to, themed("paper"), 7 * plane.unit, 12 * plane.unit);
  drawArrow(from, to, themed("ink"), 3 * plane.unit, 12 * plane.unit);
}

function drawFlash(share) {
  const { context } = plane;
  for (const { policy } of scene.segments) {
    context.beginPath();
    context.arc(...toScreen(policy.xSrc), (10 + 60 * share) * plane.unit, 0, 7);
    context.strokeStyle = policyColor();
    context.globalAlpha = 1 - share;
    context.lineWidth = 6 * plane.unit;
    context.stroke();
    context.globalAlpha = 1;
  }
}

// ==== Charts: t from 1 to 0 ======================================================================

function drawChart(id, low, high, content) {
  const canvas = element(id).querySelector("canvas");
  const { context, width, height } = fitCanvas(canvas);
  const em = parseFloat(getComputedStyle(document.documentElement).fontSize);
  const box = { left: 3.1 * em, right: width - 0.5 * em, top: 0.5 * em, bottom: height - 1.5 * em };
  const toX = (share) => box.left + share * (box.right - box.left);
  const toY = (value) => box.bottom - (value - low) / (high - low) * (box.bottom - box.top);
  const polyline = (points, color, dash = [], thickness = 2) => {
    context.beginPath();
    points.forEach(([share, value], i) =>
      (i ? context.lineTo(toX(share), toY(value)) : context.moveTo(toX(share), toY(value))));
    context.setLineDash(dash.map((length) => length * em / 14));
    context.strokeStyle = color;
    context.lineWidth = thickness * em / 14;
    context.stroke();
    context.setLineDash([]);
  };
  const label = (text, x, y, align, color = themed("muted")) => {
    context.font = `${0.82 * em}px ${getComputedStyle(document.body).fontFamily}`;
    context.textAlign = align;
    context.fillStyle = color;
    context.fillText(text, x, y);
  };
  context.strokeStyle = themed("line");
  context.lineWidth = 1;
  context.strokeRect(box.left, box.top, box.right - box.left, box.bottom - box.top);
  content({ context, toX, toY, polyline, label, box, em });
}

function drawTimeChart(id, low, high, content) {
  drawChart(id, low, high, (chart) => {
    const { context, toX, label, box, em } = chart;
    content(chart);
    for (const t of [1, 0.75, 0.5, 0.25, 0]) label(String(t), toX(1 - t), box.bottom + 1.15 * em, "center");
    for (const value of [low, high]) label(value.toFixed(Number.isInteger(value) ? 0 : 2), box.left - 0.3 * em, chart.toY(value) + 0.3 * em, "right");
    context.fillStyle = themed("ink");
    context.fillRect(toX(1 - Number(state.t)) - em / 14, box.top, em / 7, box.bottom - box.top);
  });
}

function drawWeights() {
  const points = policyAt(1).points;
  drawTimeChart("weights", 0, 1, ({ context, toX, toY }) => {
    const floor = scene.chart.map(() => 0);
    for (let k = 0; k < points.length; k++) {
      context.beginPath();
      scene.chart.forEach((row, i) => context.lineTo(toX(1 - row.t), toY(floor[i])));
      for (let i = scene.chart.length - 1; i >= 0; i--) {
        floor[i] += scene.chart[i].weights[k];
        context.lineTo(toX(1 - scene.chart[i].t), toY(floor[i]));
      }
      // With several evaluations a component has another place in each segment: the current one.
      context.fillStyle = css(colorOf(policyAt(Number(state.t)).points[k]), 0.75);
      context.fill();
      context.strokeStyle = themed("paper");
      context.lineWidth = 0.6;
      context.stroke();
    }
  });
}

function drawVelocity() {
  const shown = scene.chart.filter((row) => row.t > 0.05); // off the data u grows as 1/t
  const values = shown.flatMap((row) => [...row.policy, ...row.teacher]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = 0.08 * (high - low) + 1e-9;
  const upper = shown[0].policy[0] > shown[0].policy[1] ? 0 : 1;
  drawTimeChart("velocity", low - room, high + room, ({ polyline, label, toX, toY, em }) => {
    for (const axis of [0, 1]) {
      const line = (name) => shown.map((row) => [1 - row.t, row[name][axis]]);
      polyline(line("teacher"), themed("teacher"), [], 5);
      polyline(line("policy"), policyColor(), axis ? [5, 3] : []);
      const below = axis === upper ? 1.2 * em : -0.6 * em; // the upper name under its line
      label("xy"[axis], toX(0.02), toY(shown[0].policy[axis]) + below, "left", themed("ink"));
    }
    if (state.tool === "query") {
      for (const t of QUERY_TIMES) polyline([[1 - t, low - room], [1 - t, low - room / 3]], themed("ink"));
    }
  });
}

function drawDistance() {
  const rows = scene.chart.filter((row) => row.distance !== null);
  const ends = [...rows.map((row) => [1 - row.t, row.distance]), [1, scene.error]];
  const high = Math.max(0.1, ...ends.map(([, distance]) => 1.1 * distance));
  drawTimeChart("distance", 0, high, ({ polyline }) => polyline(ends, policyColor(), [], 2.5));
}

function drawLoss() {
  element("loss").hidden = state.policy !== "static";
  if (state.policy !== "static") return;
  const losses = training.losses.map((loss) => Math.log10(loss + 1e-12));
  const low = Math.floor(Math.min(-2, ...losses));
  const high = Math.ceil(Math.max(0, ...losses));
  drawChart("loss", low, high, ({ polyline, label, toX, toY, box, em }) => {
    polyline(losses.map((loss, i) => [i / training.iterations, loss]), themed("static"), [], 1.6);
    for (const value of [low, high]) label(`1e${value}`, box.left - 0.3 * em, toY(value) + 0.3 * em, "right");
    for (const share of [0, 0.5, 1]) {
      const align = share === 1 ? "right" : "center";
      label(String(share * training.iterations), toX(share), box.bottom + 1.15 * em, align);
    }
  });
}
