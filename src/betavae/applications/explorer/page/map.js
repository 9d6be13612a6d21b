// The map of the test images: points on one canvas, the marks that move on another above it.
import { $, ask, latest, make, page } from "./common.js";

const COLOURS = ["#4e79c4", "#f28e2b", "#43a047", "#e15759", "#a173d1", "#a9744f", "#e377c2", "#8c8f96", "#b5b02c", "#2bb3c0"];
let map = null, alone = null; // `alone`: the one label that is shown, if not all are

const factor = () => page.state.labels[$("factor").selectedIndex];

// The colour of each label, by its rank: a label may be any integer.
function colours(values) {
  const labels = [...new Set(values)].sort((a, b) => a - b), most = labels.length - 1;
  const shade = (rank) => most < COLOURS.length ? COLOURS[rank] : `hsl(${260 - 220 * rank / most} 65% 55%)`;
  return new Map(labels.map((label, rank) => [label, shade(rank)]));
}

function project(latent) {
  return [0, 1].map((axis) => latent.reduce((sum, value, d) => sum + (value - map.centre[d]) * map.axes[d][axis], 0));
}

function toScreen([x, y]) {
  return [map.scale * (x - map.middle[0]) + map.width / 2, map.height / 2 - map.scale * (y - map.middle[1])];
}

export const loadMap = latest(async () => {
  const axes = $("axes").value;
  const run = page.lead, { order } = page.state.runs[run];
  map = { run, ...await ask(`api/map?run=${run}&axes=${axes}`) };
  const names = axes === "pca" ? ["1st", "2nd"] : order.slice(0, 2).map((d) => `z${d}`);
  const shares = names.map((name, axis) => `${name} ${Math.round(100 * map.share[axis])} %`);
  $("share").textContent = `Variance of the posterior means: ${shares.join(", ")}`;
  drawMap();
});

export function drawMap() {
  if (!map) return;
  const [back, front] = $("map").children, ratio = devicePixelRatio || 1;
  [map.width, map.height] = [back.clientWidth, back.clientHeight];
  for (const canvas of [back, front]) [canvas.width, canvas.height] = [map.width * ratio, map.height * ratio];
  const sides = [0, 1].map((axis) => {
    const values = map.points.map((point) => point[axis]);
    return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  });
  map.middle = sides.map(([low, high]) => (low + high) / 2);
  map.scale = 0.95 * Math.min(...sides.map(([low, high], axis) => [map.width, map.height][axis] / (high - low || 1)));
  const context = back.getContext("2d"), values = factor(), colour = colours(values);
  context.scale(ratio, ratio);
  context.globalAlpha = 0.75;
  map.points.forEach((point, index) => {
    if (alone !== null && values[index] !== alone) return;
    const [x, y] = toScreen(point);
    context.fillStyle = colour.get(values[index]);
    context.fillRect(x - 1.25, y - 1.25, 2.5, 2.5);
  });
  const words = $("axes").selectedOptions[0].textContent;
  back.setAttribute("aria-label", `Map of ${page.state.images} test images by ${words}; a click or a number chooses one`);
  drawMarks();
}

export function drawMarks() {
  if (map?.run !== page.lead || !map.scale) return; // that of another run is still shown
  const context = $("map").children[1].getContext("2d"), ratio = devicePixelRatio || 1;
  const style = getComputedStyle(document.body), { start, end } = page.ends;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, map.width, map.height);
  context.font = "bold 13px sans-serif";
  const mark = (latent, text) => {
    const [x, y] = toScreen(project(latent));
    for (const [width, paint] of [[5, style.getPropertyValue("--card")], [2, style.color]]) {
      Object.assign(context, { lineWidth: width, strokeStyle: paint });
      context.beginPath();
      context.arc(x, y, 7, 0, 7);
      context.stroke();
      if (width === 5) context.strokeText(text, x + 11, y + 5);
    }
    context.fillStyle = style.color;
    context.fillText(text, x + 11, y + 5);
  };
  if (start && end) {
    Object.assign(context, { lineWidth: 1.5, strokeStyle: style.color });
    context.setLineDash([4, 4]);
    context.beginPath();
    for (const { z } of [start, end]) context.lineTo(...toScreen(project(z[page.lead])));
    context.stroke();
    context.setLineDash([]);
    mark(start.z[page.lead], "start");
    mark(end.z[page.lead], "end");
  }
  mark(page.z[page.lead], "");
}

/** The number of the test image nearest to a click, null where none is shown. */
export function nearest(event) {
  if (!map) return null;
  let best = null, distance = Infinity;
  map.points.forEach((point, index) => {
    if (alone !== null && factor()[index] !== alone) return;
    const [x, y] = toScreen(point), d = Math.hypot(x - event.offsetX, y - event.offsetY);
    if (d < distance) [best, distance] = [index, d];
  });
  return best;
}

export function makeLegend() {
  alone = null;
  $("legend").replaceChildren(...[...colours(factor())].map(([value, colour]) => {
    const dot = make("i");
    dot.style.background = colour;
    const button = make("button", { type: "button", ariaPressed: "false" }, dot, page.state.classes?.[value] ?? `${value}`);
    button.addEventListener("click", () => {
      alone = alone === value ? null : value;
      for (const each of $("legend").children) each.ariaPressed = String(each === button && alone !== null);
      drawMap();
    });
    return button;
  }));
}
