// The page: sliders, pictures, the chosen image, the path.
import { $, create, draw, getLabel, page, request, runLatest, setSize, showMessage } from "./common.js";
import { makeDrawing } from "./drawing.js";
import { drawMap, drawMarks, findNearest, loadMap, makeLegend } from "./map.js";

const FRAMES = 11, MAX_SLIDERS = 12; // images on a path; sliders before "show all"
const canvases = [], scores = []; // one per run
let chosen = null, moved = false; // name of the encoded image; whether the latents have changed since

// ---- latents and decoded images

const decode = runLatest(async (start) => {
  const { images } = await request("api/decode", { z: page.z, label: getLabel() });
  images.forEach((text, run) => draw(canvases[run], text));
  document.body.dataset.answered = performance.now() - start;
  $("answer").textContent = `last response in ${Math.round(document.body.dataset.answered)} ms`;
});

function update() {
  decode(performance.now());
  const { order } = page.state.runs[page.lead];
  document.querySelectorAll(".slider").forEach((slider, rank) => {
    slider.hidden = rank >= order.length || (rank >= MAX_SLIDERS && !$("all").hidden);
    if (slider.hidden) return;
    const [range, output] = slider.querySelectorAll("input, output"), value = page.z[page.lead][order[rank]];
    range.max = Math.max(range.max, Math.ceil(Math.abs(value)));
    range.min = -range.max;
    range.value = value;
    output.textContent = value.toFixed(2);
  });
  drawMarks();
}

/** Set the dimension of this rank by KL in each run. */
function setDimension(rank, value) {
  page.state.runs.forEach(({ order }, run) => { if (rank < order.length) page.z[run][order[rank]] = value; });
}

function setAll(latents, caption) {
  page.z = latents;
  clearChosen(caption);
  update();
}

function setMean() {
  setAll(page.state.runs.map(({ centers }) => [...centers[getLabel() ?? 0]]), "none: the prior's mean");
}

const sample = runLatest(async () => {
  const query = getLabel() === null ? "" : `?label=${getLabel()}`;
  setAll((await request(`api/sample${query}`)).z, "none: a sample of the prior");
});

function makeSliders() {
  const { runs } = page.state, most = Math.max(...runs.map(({ order }) => order.length));
  for (let rank = 0; rank < most; rank++) {
    const reach = Math.max(...runs.map((run) => Math.ceil(run.reach[run.order[rank]] || 0)));
    const range = create("input", { type: "range", min: -reach, max: reach, step: 0.01, id: `slider${rank}` });
    range.addEventListener("input", () => { moved = true; setDimension(rank, Number(range.value)); update(); });
    const name = create("span", {}, create("meter", { max: 1, ariaHidden: "true" }), "");
    $("sliders").append(create("label", { className: "slider" }, name, range, create("output", { htmlFor: range.id })));
  }
  $("all").hidden = most <= MAX_SLIDERS;
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

function clearChosen(caption) {
  chosen = page.index = null;
  $("chosen").textContent = caption;
  const canvas = $("input").querySelector("canvas");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  scores.forEach((list) => list.replaceChildren());
}

function choose({ image, runs }, name, caption, index = null) {
  [chosen, moved] = [name, false];
  page.index = index;
  $("chosen").textContent = caption;
  draw($("input").querySelector("canvas"), image);
  $("meanings").textContent = runs[0].scores.map(({ name, meaning }) => `${name}: ${meaning}`).join("; ") + ".";
  runs.forEach(({ mean, scores: rows }, run) => {
    page.z[run] = mean;
    scores[run].replaceChildren(...rows.flatMap(({ name, value, unit, meaning }) => [
      create("dt", { textContent: name, title: meaning }),
      create("dd", { textContent: value === null ? "not finite" : `${value.toFixed(1)} ${unit}`, title: meaning }),
    ]));
  });
  update();
}

const chooseTestImage = runLatest(async (index) => {
  const response = await request("api/image", { index }), values = page.state.labels.map((factor) => factor[index]);
  $("index").value = index;
  if (getLabel() !== null) $("label").selectedIndex = values[0];
  const label = page.state.classes?.[values[0]] ?? values.join(", ");
  choose(response, `test image ${index}`, `Test image ${index}, label ${label}`, index);
});

const choosePicture = runLatest(async (blob, caption, query) => {
  choose(await request(`api/upload?${query}`, blob, "application/octet-stream"), `your ${caption}`, `Your ${caption}`);
});

// ---- the path

const drawPath = runLatest(async () => {
  const { start, end } = page.ends;
  const { images } = await request("api/path", { start: start.z, end: end.z, steps: FRAMES, label: getLabel() });
  document.querySelectorAll("#strips canvas").forEach((canvas, run) => {
    images[run].forEach((text, column) => draw(canvas, text, column));
  });
});

function setEnd(which) {
  page.ends[which] = { z: page.z.map((latent) => [...latent]), name: (!moved && chosen) || "a custom point" };
  const { start, end } = page.ends;
  if (!start || !end) return;
  $("ends").textContent = `from ${start.name} to ${end.name}`;
  $("along").value = which === "start" ? 0 : 1;
  drawPath();
  drawMarks();
}

function moveAlongPath(share) {
  const { start, end } = page.ends;
  if (!start || !end) return;
  $("along").value = share;
  moved = true;
  page.z = start.z.map((from, run) => from.map((value, d) => (1 - share) * value + share * end.z[run][d]));
  update();
}

// ---- start

function makeRuns() {
  const canvas = setSize($("input").querySelector("canvas")), several = page.state.runs.length > 1;
  for (const run of page.state.runs) {
    canvases.push(setSize(create("canvas", { role: "img", ariaLabel: `decoded by ${run.name}` })));
    scores.push(create("dl"));
    const nats = run.kl.reduce((a, b) => a + b, 0).toFixed(1);
    const beta = run.name.includes("beta=") ? "" : `β ${run.beta} · `;
    const words = `${beta}${run.order.length} dimensions · KL ${nats} nats`;
    $("pictures").append(create("figure", { className: "card", title: run.path }, canvases.at(-1),
      create("figcaption", {}, create("b", { textContent: run.name }), create("small", { textContent: words }), scores.at(-1))));
    $("lead").append(create("option", { textContent: run.name }));
    const strip = setSize(create("canvas", { role: "img", ariaLabel: `path, decoded by ${run.name}` }), FRAMES);
    strip.addEventListener("click", (event) => {
      moveAlongPath(Math.min(Math.floor(FRAMES * event.offsetX / strip.clientWidth), FRAMES - 1) / (FRAMES - 1));
    });
    $("strips").append(create("figure", {}, strip, ...(several ? [create("figcaption", { textContent: run.name })] : [])));
  }
  canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  $("lead-label").hidden = $("several").hidden = !several;
}

async function start() {
  const state = page.state = await request("api/state");
  page.z = state.runs.map(({ centers }) => [...centers[0]]);
  $("about").textContent = `${state.data}, ${state.images.toLocaleString("en")} test images, ` +
    (state.runs.length > 1 ? `${state.runs.length} runs side by side` : state.runs[0].path);
  $("note").textContent = `Numbers are in nats per image: ${state.note}.`;
  $("index").max = state.images - 1;
  state.labels.forEach((_, number) => $("factor").append(create("option", { textContent: `factor ${number + 1}` })));
  $("factor-label").hidden = state.labels.length < 2;
  makeRuns();
  makeSliders();
  nameSliders();
  makeLegend();
  state.conditions.forEach((name) => $("label").append(create("option", { textContent: name })));
  $("label-label").hidden = !state.conditions.length;
  const readAgain = makeDrawing(choosePicture, setMean);

  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("lead", "change", () => { page.lead = $("lead").selectedIndex; nameSliders(); update(); loadMap(); });
  on("label", "change", () => {
    if (chosen?.startsWith("your ")) readAgain();
    else update();
    if (page.ends.start && page.ends.end) drawPath();
  });
  on("sample", "click", sample);
  on("zero", "click", setMean);
  on("all", "click", () => { $("all").hidden = true; update(); });
  on("axes", "change", loadMap);
  on("factor", "change", () => { makeLegend(); drawMap(); });
  $("map").firstElementChild.addEventListener("click", (event) => {
    const index = findNearest(event);
    if (index !== null) chooseTestImage(index);
  });
  on("index", "change", () => chooseTestImage(Number($("index").value)));
  on("any", "click", () => chooseTestImage(Math.floor(state.images * Math.random())));
  on("start", "click", () => setEnd("start"));
  on("end", "click", () => setEnd("end"));
  on("along", "input", () => moveAlongPath(Number($("along").value)));
  new ResizeObserver(drawMap).observe($("map"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMarks);

  await loadMap();
  // Start with a path from the first test image to the second.
  if (state.images > 1) {
    await chooseTestImage(1);
    setEnd("end");
  }
  await chooseTestImage(0);
  setEnd("start");
  document.body.dataset.ready = "yes";
}

start().catch((error) => showMessage(error.message));
