// The page: sliders, pictures, the chosen image, the path.
import { $, ask, draw, latest, make, page, say, sized } from "./common.js";
import { makeDrawing } from "./drawing.js";
import { drawMap, drawMarks, loadMap, makeLegend, nearest } from "./map.js";

const FRAMES = 11, SHOWN = 12; // pictures of a path, sliders before "show all"
const canvases = [], scores = []; // one for each run
let chosen = null; // what the latents are of, null once nothing in particular

// ---- latents and what they decode to

const decode = latest(async (asked) => {
  const { pictures } = await ask("api/decode", { z: page.z });
  pictures.forEach((text, run) => draw(canvases[run], text));
  document.body.dataset.answered = performance.now() - asked;
  $("answer").textContent = `last answer in ${Math.round(document.body.dataset.answered)} ms`;
});

function moved() {
  decode(performance.now());
  const { order } = page.state.runs[page.lead];
  document.querySelectorAll(".slider").forEach((slider, rank) => {
    slider.hidden = rank >= order.length || (rank >= SHOWN && !$("all").hidden);
    if (slider.hidden) return;
    const [range, output] = slider.querySelectorAll("input, output"), value = page.z[page.lead][order[rank]];
    range.max = Math.max(range.max, Math.ceil(Math.abs(value)));
    range.min = -range.max;
    range.value = value;
    output.textContent = value.toFixed(2);
  });
  drawMarks();
}

/** Sets, in each run, the dimension of this rank by KL. */
function set(rank, value) {
  page.state.runs.forEach(({ order }, run) => { if (rank < order.length) page.z[run][order[rank]] = value; });
}

function setAll(value, caption) {
  document.querySelectorAll(".slider").forEach((_, rank) => set(rank, value()));
  forget(caption);
  moved();
}

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

function makeSliders() {
  const { runs } = page.state, most = Math.max(...runs.map(({ order }) => order.length));
  for (let rank = 0; rank < most; rank++) {
    const reach = Math.max(3, ...runs.map((run) => Math.ceil(run.reach[run.order[rank]] || 0)));
    const range = make("input", { type: "range", min: -reach, max: reach, step: 0.01, id: `slider${rank}` });
    range.addEventListener("input", () => { set(rank, Number(range.value)); moved(); });
    const name = make("span", {}, make("meter", { max: 1, ariaHidden: "true" }), "");
    $("sliders").append(make("label", { className: "slider" }, name, range, make("output", { htmlFor: range.id })));
  }
  $("all").hidden = most <= SHOWN;
  $("all").textContent = `Show all ${most}`;
}

function nameSliders() {
  const { kl, order } = page.state.runs[page.lead];
  document.querySelectorAll(".slider").forEach((slider, rank) => {
    const dimension = order[rank], nats = kl[dimension] ?? 0;
    slider.querySelector("meter").value = nats / kl[order[0]];
    slider.querySelector("span").lastChild.textContent = `z${dimension} · ${nats.toFixed(2)} nats`;
    slider.querySelector("input").setAttribute("aria-label", `z${dimension}, KL ${nats.toFixed(2)} nats`);
    slider.title = page.state.runs.map((run) => `${run.name}: z${run.order[rank] ?? " none"}`).join("\n");
  });
}

// ---- the chosen image

function forget(caption) {
  chosen = null;
  $("chosen").textContent = caption;
  const canvas = $("input").querySelector("canvas");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  scores.forEach((list) => list.replaceChildren());
}

function choose({ image, runs }, what, caption) {
  chosen = what;
  $("chosen").textContent = caption;
  draw($("input").querySelector("canvas"), image);
  $("meanings").textContent = runs[0].scores.map(({ name, meaning }) => `${name}: ${meaning}`).join("; ") + ".";
  runs.forEach(({ mean, scores: rows }, run) => {
    page.z[run] = mean;
    scores[run].replaceChildren(...rows.flatMap(({ name, value, unit, meaning }) => [
      make("dt", { textContent: name, title: meaning }),
      make("dd", { textContent: value === null ? "not finite" : `${value.toFixed(1)} ${unit}`, title: meaning }),
    ]));
  });
  moved();
}

const chooseTest = latest(async (index) => {
  const answer = await ask("api/image", { index }), values = page.state.labels.map((factor) => factor[index]);
  $("index").value = index;
  const label = page.state.classes?.[values[0]] ?? values.join(", ");
  choose(answer, `test image ${index}`, `Test image ${index}, label ${label}`);
});

const choosePicture = latest(async (blob, caption, query) => {
  choose(await ask(`api/picture?${query}`, blob, "application/octet-stream"), `your ${caption}`, `Your ${caption}`);
});

// ---- the path

const drawPath = latest(async () => {
  const { start, end } = page.ends;
  const { pictures } = await ask("api/path", { start: start.z, end: end.z, steps: FRAMES });
  document.querySelectorAll("#strips canvas").forEach((canvas, run) => {
    pictures[run].forEach((text, column) => draw(canvas, text, column));
  });
});

function setEnd(which) {
  page.ends[which] = { z: page.z.map((latent) => [...latent]), name: chosen ?? "a point of your own" };
  const { start, end } = page.ends;
  if (!start || !end) return;
  $("ends").textContent = `from ${start.name} to ${end.name}`;
  $("along").value = which === "start" ? 0 : 1;
  drawPath();
  drawMarks();
}

function goAlong(share) {
  const { start, end } = page.ends;
  if (!start || !end) return;
  $("along").value = share;
  page.z = start.z.map((from, run) => from.map((value, d) => (1 - share) * value + share * end.z[run][d]));
  moved();
}

// ---- the beginning

function makeRuns() {
  const canvas = sized($("input").querySelector("canvas")), several = page.state.runs.length > 1;
  for (const run of page.state.runs) {
    canvases.push(sized(make("canvas", { role: "img", ariaLabel: `decoded by ${run.name}` })));
    scores.push(make("dl"));
    const nats = run.kl.reduce((a, b) => a + b, 0).toFixed(1);
    const beta = run.name.includes("beta=") ? "" : `β ${run.beta} · `;
    const words = `${beta}${run.order.length} dimensions · KL ${nats} nats`;
    $("pictures").append(make("figure", { className: "card", title: run.path }, canvases.at(-1),
      make("figcaption", {}, make("b", { textContent: run.name }), make("small", { textContent: words }), scores.at(-1))));
    $("lead").append(make("option", { textContent: run.name }));
    const strip = sized(make("canvas", { role: "img", ariaLabel: `path, decoded by ${run.name}` }), FRAMES);
    strip.addEventListener("click", (event) => {
      goAlong(Math.min(Math.floor(FRAMES * event.offsetX / strip.clientWidth), FRAMES - 1) / (FRAMES - 1));
    });
    $("strips").append(make("figure", {}, strip, ...(several ? [make("figcaption", { textContent: run.name })] : [])));
  }
  canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  $("lead-label").hidden = $("several").hidden = !several;
}

async function begin() {
  const state = page.state = await ask("api/state");
  page.z = state.runs.map(({ order }) => order.map(() => 0));
  $("about").textContent = `${state.data}, ${state.images.toLocaleString("en")} test images, ` +
    (state.runs.length > 1 ? `${state.runs.length} runs side by side` : state.runs[0].path);
  $("note").textContent = `Numbers are in nats per image: ${state.note}.`;
  $("index").max = state.images - 1;
  state.labels.forEach((_, number) => $("factor").append(make("option", { textContent: `factor ${number + 1}` })));
  $("factor-label").hidden = state.labels.length < 2;
  makeRuns();
  makeSliders();
  nameSliders();
  makeLegend();
  makeDrawing(choosePicture, () => setAll(() => 0, "none: the prior's mean"));

  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("lead", "change", () => { page.lead = $("lead").selectedIndex; nameSliders(); moved(); loadMap(); });
  on("sample", "click", () => setAll(normal, "none: a sample of the prior"));
  on("zero", "click", () => setAll(() => 0, "none: the prior's mean"));
  on("all", "click", () => { $("all").hidden = true; moved(); });
  on("axes", "change", loadMap);
  on("factor", "change", () => { makeLegend(); drawMap(); });
  $("map").firstElementChild.addEventListener("click", (event) => {
    const index = nearest(event);
    if (index !== null) chooseTest(index);
  });
  on("index", "change", () => chooseTest(Number($("index").value)));
  on("any", "click", () => chooseTest(Math.floor(state.images * Math.random())));
  on("start", "click", () => setEnd("start"));
  on("end", "click", () => setEnd("end"));
  on("along", "input", () => goAlong(Number($("along").value)));
  new ResizeObserver(drawMap).observe($("map"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMarks);

  await loadMap();
  // Begin with something to see: a path from the first test image to the second.
  if (state.images > 1) {
    await chooseTest(1);
    setEnd("end");
  }
  await chooseTest(0);
  setEnd("start");
  document.body.dataset.ready = "yes";
}

begin().catch((error) => say(error.message));
