// The page: its state, what follows from it, the plane, the charts, the controls.
// Every state of the page is a line such as "policy=dx&t=0.5&push=0.5,1,0": the address keeps it,
// a button's data-set changes a part of it, a sentence's button sets all of it.

// ==== State ======================================================================================

const DEFAULTS = {
  policy: "gmflow", nfe: "1", substeps: "128", solver: "euler", noise: "2,-2.4", t: "1",
  push: "", tool: "noise", ask: "imitate", query: "", step: "0",
};
const ACCEPTED = { // of the address; what does not fit is ignored
  policy: /^(gmflow|dx|teacher|static)$/, nfe: /^[124]$/, substeps: /^(1|4|16|128)$/,
  solver: /^(euler|deis|exact)$/, noise: /^-?[0-2](\.\d+)?,-?[0-2](\.\d+)?$/,
  t: /^(0?\.\d+|[01])$/, push: /^(0?\.\d+,-?\d(\.\d+)?,-?\d(\.\d+)?)?$/,
  tool: /^(noise|push|query)$/, ask: /^(imitate|clone)$/,
  query: /^(0?\.\d+|1)?$/, step: /^(\d|10)$/,
};
const LIMIT = 2.9; // of the plane
const STATIC_COMPONENTS = 8;
const TRAINING_STEPS = 300;
const STATIC_SEED = 24; // a start that errs visibly for the first noise
const QUERY_TIMES = Array.from({ length: 8 }, (_, m) => 1 - (m + 0.5) / 8);
const STILL = matchMedia("(prefers-reduced-motion: reduce)").matches;
const SENTENCES = [
  ["The teacher, in grey, is a flow model: each of its 128 steps from noise to data is a network call.",
    "policy=teacher&t=0"],
  ["With four calls its straight steps miss.",
    "policy=teacher&substeps=4&t=0"],
  ["The student's network is called once, at the noise. It outputs 16 points with weights: the discs.",
    "policy=gmflow&t=1"],
  ["The discs are a policy: a formula for the velocity at every later state and time. One call is enough: its 128 substeps need no network.",
    "policy=gmflow&t=0&play=1"],
  ["As noise falls, Bayes' rule moves weight between the discs; the cross is the x_0 that the velocity points at.",
    "policy=gmflow&t=0.45"],
  ["Push the state: GMFlow sees where it is and leads on to where the teacher would lead.",
    "policy=gmflow&tool=push&t=0.5&push=0.5,0,1"],
  ["DX, the other policy, only knows the time: after the same push it ends where it would have ended anyway.",
    "policy=dx&tool=push&t=0.5&push=0.5,0,1"],
  ["Training queries the teacher at states that the policy visits, here an untrained one. The gap of the two arrows is the loss: that is pi-ID.",
    "policy=static&tool=query&ask=imitate&query=0.313&t=0.313"],
  ["Cloning would query states on the teacher's trajectory, where the policy's own errors never lead.",
    "policy=static&tool=query&ask=clone&query=0.313&t=0.313"],
  ["Watch pi-ID train: 300 steps on the discs of this one noise, without a network.",
    "policy=static&t=0.3&train=1"],
];

const STUDENTS = Object.fromEntries(
  Object.entries(STUDENT_FILES).map(([name, base64]) => [name, readSafetensors(base64)]));
const element = (id) => document.getElementById(id);
const numbers = (text) => text.split(",").map(Number);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const rounded = (value) => String(Math.round(value * 1000) / 1000);

let state = { ...DEFAULTS };
let scene = null; //    what follows from the state, see makeScene
let training = null; // a run of startTraining
let revealed = 0; //    when the counters and discs began to unfold
let dragged = null; //  the noise under the finger: no network is called before it is dropped
let playing = false;
let queries = 0; //     of the teacher, by hand, since the policy came
let addressTimer = 0;

function parseState(text) {
  const wanted = Object.fromEntries(new URLSearchParams(text));
  const fits = Object.entries(wanted).filter(([key, value]) => ACCEPTED[key]?.test(value));
  return Object.fromEntries(fits);
}

function setState(changes) {
  const next = { ...state, ...changes };
  if (next.solver === "exact" && next.policy !== "dx") next.solver = "euler";
  if (next.policy === "static" || next.policy === "teacher") next.nfe = "1";
  const moved = next.noise !== state.noise;
  if (moved || (changes.policy && next.policy !== state.policy)) queries = 0;
  if (moved) training = null;
  if (changes.query) queries += 1;
  const changed = Object.keys(next).filter((key) => next[key] !== state[key]);
  state = next;
  if (!scene || changed.some((key) => !["t", "tool", "query", "step"].includes(key))) makeScene();
  clearTimeout(addressTimer); // browsers limit how often an address changes
  addressTimer = setTimeout(() => history.replaceState(null, "", address()), 200);
  showControls();
  draw();
}

function address() {
  const parts = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
  return location.href.split("#")[0] + "#" + parts.map(([key, value]) => `${key}=${value}`).join("&");
}

// ==== What follows from the state ================================================================

const evaluated = new Map(); // the network's outputs: the same place is not evaluated twice

function makePolicy(x, t) {
  if (state.policy === "teacher") return teacherPolicy;
  if (state.policy === "static") {
    training = training ?? startTraining(x, STATIC_COMPONENTS, TRAINING_STEPS, STATIC_SEED);
    return staticPolicy(training.parameters, x);
  }
  const key = [state.policy, x, t].join();
  if (!evaluated.has(key)) {
    if (evaluated.size > 200) evaluated.clear();
    evaluated.set(key, evaluateNetwork(STUDENTS[state.policy], x, t));
    revealed = performance.now();
  }
  return evaluated.get(key);
}

function makeScene() {
  const noise = numbers(state.noise);
  const [pushTime, ...by] = state.push ? numbers(state.push) : [];
  const push = state.push ? { t: pushTime, by } : null;
  // The exact solution needs no substeps: more of them only draw its curve.
  const substeps = state.solver === "exact" ? 128 : Number(state.substeps);
  const segments = sample(makePolicy, noise, Number(state.nfe), substeps, state.solver, push);
  const states = segments.flatMap((segment) => segment.states);
  // The teacher starts from the same noise, and after a push from the pushed state.
  const start = push ? states.findIndex((s, i) => i && s.t === push.t && states[i - 1].t === s.t) : 0;
  const from = states[Math.max(start, 0)];
  const teacher = rollout(teacherPolicy, from.x, from.t, 0, 128, "euler");
  const unpushed = push
    ? sample(makePolicy, noise, Number(state.nfe), substeps, state.solver).flatMap((s) => s.states)
    : null;
  const calls = { student: state.policy === "static" ? 0 : Number(state.nfe), teacher: 128 };
  if (state.policy === "teacher") Object.assign(calls, { student: 0, teacher: states.length - 1 });
  const error = rmse(states[states.length - 1].x, teacher[teacher.length - 1].x);
  scene = { noise, push, segments, states, teacher, unpushed, calls, error };
  scene.queried = state.ask === "imitate" ? states : teacher;
  scene.chart = chartRows();
}

const policyAt = (t) => scene.segments.find((s) => t > s.tEnd || s.tEnd === 0).policy;

function velocities(t) {
  const x = stateAt(scene.queried, t);
  return { x, t, policy: policyAt(t).velocity(x, t), teacher: teacherPolicy.velocity(x, t) };
}

function chartRows() {
  return Array.from({ length: 97 }, (_, i) => {
    const t = Math.max(1 - i / 96, 1e-3);
    const x = stateAt(scene.states, t);
    const teacherX = t <= scene.teacher[0].t ? stateAt(scene.teacher, t) : null;
    return {
      ...velocities(t), weights: policyAt(t).weights(x, t),
      distance: teacherX && rmse(x, teacherX),
    };
  });
}

function squaredGap({ policy, teacher }) {
  const gap = subtract(policy, teacher);
  return dot(gap, gap) / 2;
}

// ==== Words and numbers ==========================================================================

const NAMES = { gmflow: "GMFlow", dx: "DX", teacher: "the teacher", static: "the static policy" };

// One or two sentences on what the plane shows.
function sayWhatIsSeen() {
  const error = scene.error.toFixed(3);
  const name = NAMES[state.policy];
  if (dragged) return "Drop it: the network is evaluated once, there.";
  if (state.tool === "query" && state.query) {
    const gap = squaredGap(velocities(Number(state.query)));
    const mean = sum(QUERY_TIMES.map((t) => squaredGap(velocities(t)))) / QUERY_TIMES.length;
    return `At t = ${rounded(Number(state.query))}: the policy's velocity in colour, the teacher's in grey. Squared gap, `
      + `the loss here: ${gap.toFixed(4)}; mean of the eight diamonds: ${mean.toFixed(4)}.`;
  }
  if (state.tool === "query") return "Click a state on the trajectory: both velocities appear.";
  if (scene.push) {
    const shift = rmse(scene.unpushed[scene.unpushed.length - 1].x, scene.states[scene.states.length - 1].x);
    return `Pushed at t = ${rounded(scene.push.t)}. The end moves by ${shift.toFixed(3)}; `
      + `it is ${error} from where the teacher leads after the push.`;
  }
  if (state.tool === "push") return "Drag in the plane: the state at this t moves there.";
  if (state.policy === "teacher") {
    const calls = `${scene.calls.teacher} network call${scene.calls.teacher > 1 ? "s" : ""}, one for each step.`;
    return scene.error ? `${calls} They end ${error} from the end of 128 Euler steps.` : calls;
  }
  if (state.policy === "static") {
    return `${training.done} of ${training.iterations} steps of pi-ID on ${training.parameters.length} numbers. `
      + `The rollout ends ${error} from the teacher.`;
  }
  const calls = state.nfe === "1" ? `One network call gives ${name}'s policy`
    : `${state.nfe} network calls give ${state.nfe} policies, one after the other`;
  return `${calls}; ${state.solver === "exact" ? "the exact solution" : "the rollout"} `
    + `ends ${error} from the teacher. Drag the noise: the network is called again where you drop it.`;
}

function showCounters(progress) {
  const seen = state.policy === "teacher" ? 1 : progress;
  element("calls").firstChild.textContent = dragged ? 0 : scene.calls.student;
  const teacherCalls = dragged ? 0 : Math.round(seen * scene.calls.teacher);
  element("teacher-calls").firstChild.textContent = teacherCalls + (queries ? ` + ${queries}` : "");
  element("teacher-calls").lastChild.textContent =
    "network calls of the teacher" + (queries ? " + your queries" : "");
  element("error").firstChild.textContent = dragged ? "-" : scene.error.toFixed(3);
  element("calls").classList.toggle("flash", progress < 0.5 && isStudent());
}

const ICONS = [ // of the legend: [drawing in a box of 24 x 14, words]
  ["<circle cx='12' cy='7' r='5' fill='none' stroke='var(--ink)' stroke-width='2.5'/>", "noise"],
  ["<circle cx='12' cy='7' r='5' fill='var(--ink)'/>", "state at t"],
  ["<path d='M7 2L17 12M7 12L17 2' stroke='var(--ink)' stroke-width='2.5'/>", "its x_0"],
  ["<circle cx='12' cy='7' r='6.5' fill='#73c2fa' stroke='var(--ink)'/>", "component, area = weight"],
  ["<path d='M0 7H24' stroke='var(--accent-now)' stroke-width='3'/>", "rollout"],
  ["<path d='M0 7H24' stroke='var(--teacher)' stroke-width='3' stroke-dasharray='6 4'/>", "teacher"],
  ["<path d='M2 7H20M15 3L20 7L15 11' fill='none' stroke='var(--muted)' stroke-width='1.5'/>", "velocity, -u"],
  ["<rect x='6' y='1' width='12' height='12' fill='var(--data)' stroke='var(--line)'/>", "data"],
];

function showControls() {
  document.documentElement.style.setProperty("--accent-now", `var(--${state.policy})`);
  for (const button of document.querySelectorAll("#controls [data-set]")) {
    const [key, value] = button.dataset.set.split("=");
    button.setAttribute("aria-pressed", String(state[key] === value));
    const only = key === "nfe" && !isStudent() || value === "exact" && state.policy !== "dx"
      || key === "substeps" && state.solver === "exact";
    button.disabled = only;
  }
  element("level").value = 1 - Number(state.t); // from left to right as in the charts
  element("level-value").textContent = "t = " + Number(state.t).toFixed(2);
  element("play").textContent = playing ? "Pause" : "Play";
  const current = Number(state.step) - 1;
  document.querySelectorAll("#sentences li").forEach((item, i) =>
    item.className = i === current ? "current" : i === 0 && current < 0 ? "first" : "");
  element("page").textContent = `${Math.max(current, 0) + 1} of ${SENTENCES.length}`;
  const what = { gmflow: "weights of the 16 components", static: "weights of the 8 components",
    dx: "weights of the 16 grid points", teacher: "weights of the 8 squares" };
  element("weights").firstElementChild.innerHTML = `Who wins <small>${what[state.policy]} over t</small>`;
  const whose = state.ask === "imitate" ? "policy's" : "teacher's";
  element("velocity").firstElementChild.innerHTML =
    `Velocity <small>at the ${whose} states; x solid, y dashed</small>`;
}

let frame = 0;
function draw() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    const progress = drawPlane();
    showCounters(progress);
    element("says").textContent = sayWhatIsSeen();
    drawWeights();
    drawVelocity();
    drawDistance();
    drawLoss();
    if (progress < 1) draw();
  });
}

// ==== Controls ===================================================================================

function play() {
  playing = !playing;
  if (playing && Number(state.t) === 0) state.t = "1";
  let before = performance.now();
  const tick = (now) => {
    if (!playing) return;
    const t = Math.max(0, Number(state.t) - Math.min(now - before, 100) / 6000); // six seconds
    before = now;
    playing = t > 0;
    setState({ t: rounded(t) });
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
  showControls();
}

function train() {
  setState({ policy: "static", push: "", query: "" });
  const run = startTraining(scene.noise, STATIC_COMPONENTS, TRAINING_STEPS, STATIC_SEED);
  training = run;
  const tick = () => {
    if (run !== training || state.policy !== "static") return;
    for (let i = 0; i < (STILL ? 50 : 2) && run.done < run.iterations; i++) trainStep(run);
    makeScene();
    draw();
    if (run.done < run.iterations) requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}

function drawNoise() {
  const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  dropNoise([normal(), normal()]);
}

function dropNoise(x) {
  revealed = performance.now();
  setState({ noise: x.map((c) => rounded(clamp(c, -2.8, 2.8))).join(), push: "", query: "" });
}

function showSentence(index) {
  const step = clamp(index, 0, SENTENCES.length - 1);
  const wanted = new URLSearchParams(SENTENCES[step][1]);
  revealed = performance.now();
  playing = false;
  training = null; // each sentence begins untrained
  scene = null;
  setState({ ...DEFAULTS, ...parseState(SENTENCES[step][1]), step: String(step + 1) });
  if (wanted.has("play")) play();
  if (wanted.has("train")) train();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.clear();
  element("theme").textContent = name === "dark" ? "Light" : "Dark";
  draw();
}

async function copyLink() {
  try {
    await navigator.clipboard.writeText(address());
    element("says").textContent = "Copied: the address holds this state.";
  } catch {
    element("says").textContent = "Copy the address of the page: it holds this state.";
  }
}

const ACTIONS = {
  play, train, draw: drawNoise, link: copyLink,
  previous: () => showSentence(Number(state.step) - 2), next: () => showSentence(Number(state.step)),
  theme: () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"),
};

function listen() {
  document.addEventListener("click", (event) => {
    const { set, do: action, show } = event.target.closest("[data-set], [data-do], [data-show]")?.dataset ?? {};
    if (set) setState(parseState(set));
    if (action) ACTIONS[action]();
    if (show) showSentence(Number(show));
  });
  element("level").addEventListener("input", (event) => {
    playing = false;
    setState({ t: rounded(1 - event.target.value) });
  });
  listenToPlane(element("plane"));
  for (const id of ["weights", "velocity", "distance"]) listenToChart(element(id).querySelector("canvas"));
  window.addEventListener("resize", draw);
  window.addEventListener("hashchange", () => setState({ ...DEFAULTS, ...parseState(location.hash.slice(1)) }));
}

function listenToPlane(canvas) {
  let down = false;
  const where = (event) => {
    const box = canvas.getBoundingClientRect();
    return toPlane(event.clientX - box.left, event.clientY - box.top).map((c) => clamp(c, -2.8, 2.8));
  };
  const move = (event) => {
    if (!down) return;
    if (state.tool === "noise") dragged = where(event);
    if (state.tool === "push") pushTo(where(event));
    if (state.tool === "query") queryNear(where(event));
    if (dragged) draw();
  };
  const drop = () => {
    const x = dragged;
    down = false;
    dragged = null;
    if (x) dropNoise(x);
  };
  canvas.addEventListener("pointerdown", (event) => {
    playing = false;
    down = true;
    canvas.setPointerCapture(event.pointerId);
    move(event);
  });
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerup", drop);
  canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("keydown", (event) => {
    if (event.key === " ") play();
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (moves[event.key]) moveByKey(moves[event.key]);
    if (event.key === " " || moves[event.key]) event.preventDefault();
  });
}

function moveByKey(direction) {
  const by = scale(0.1, direction);
  if (state.tool === "noise") dropNoise(add(scene.noise, by));
  if (state.tool === "push") pushTo(add(scene.push ? scene.teacher[0].x : stateAt(scene.states, pushLevel()), by));
  if (state.tool === "query") {
    const last = QUERY_TIMES.findIndex((t) => rounded(t) === state.query);
    const next = clamp(last + direction[0] - direction[1], 0, QUERY_TIMES.length - 1);
    setState({ query: rounded(QUERY_TIMES[next]), t: rounded(QUERY_TIMES[next]) });
  }
}

// A push happens at the level of the slider, or in the middle if that is an end.
const pushLevel = () => (Number(state.t) > 0.02 && Number(state.t) < 0.98 ? Number(state.t) : 0.5);

function pushTo(x) {
  const t = pushLevel();
  const before = stateAt(scene.unpushed ?? scene.states, t);
  setState({ t: rounded(t), push: [t, ...subtract(x, before)].map(rounded).join() });
}

function queryNear(x) {
  const steps = Array.from({ length: 99 }, (_, i) => 0.99 - i / 100);
  const distance = (t) => rmse(stateAt(scene.queried, t), x);
  const t = steps.reduce((best, level) => (distance(level) < distance(best) ? level : best));
  if (rounded(t) !== state.query) setState({ query: rounded(t), t: rounded(t) });
}

function listenToChart(canvas) {
  const set = (event) => {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect();
    const em = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const share = (event.clientX - box.left - 3.1 * em) / (box.width - 3.6 * em);
    playing = false;
    setState({ t: rounded(1 - clamp(share, 0, 1)) });
  };
  canvas.addEventListener("pointerdown", set);
  canvas.addEventListener("pointermove", set);
}

function start() {
  element("sentences").innerHTML = SENTENCES.map(([text], i) =>
    `<li data-show="${i}"><button type="button" aria-label="Show sentence ${i + 1}">${i + 1}</button>`
    + `<span>${text}</span></li>`).join("");
  element("legend").innerHTML = ICONS.map(([drawing, words]) =>
    `<span><svg viewBox="0 0 24 14" aria-hidden="true">${drawing}</svg> ${words}</span>`).join("");
  listen();
  revealed = performance.now();
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setState(parseState(location.hash.slice(1)));
}
start();
