// The map of the test images: points on one canvas, and moving marks on another above it.
import { $, create, page, request, runLatest } from "./common.js";

const COLORS = ["#4e79c4", "#f28e2b", "#43a047", "#e15759", "#a173d1", "#a9744f", "#e377c2", "#8c8f96", "#b5b02c", "#2bb3c0"];
let map = null, onlyLabel = null; // `onlyLabel` is null while all labels are shown

const getFactor = () => page.state.labels[$("factor").selectedIndex];

// Colors are by the rank of a label, since a label may be any integer.
function chooseColors(values) {
  const labels = [...new Set(values)].sort((a, b) => a - b), most = labels.length - 1;
  const shade = (rank) => most < COLORS.length ? COLORS[rank] : `hsl(${260 - 220 * rank / most} 65% 55%)`;
  return new Map(labels.map((label, rank) => [label, shade(rank)]));
}

function project(latent) {
  return [0, 1].map((axis) => latent.reduce((sum, value, d) => sum + (value - map.center[d]) * map.axes[d][axis], 0));
}

function toScreen([x, y]) {
  return [map.scale * (x - map.middle[0]) + map.width / 2, map.height / 2 - map.scale * (y - map.middle[1])];
}

export const loadMap = runLatest(async () => {
  const axes = $("axes").value;
  const run = page.lead, { order } = page.state.runs[run];
  if (axes === "tsne") $("share").textContent = "computing a t-SNE of the first test images …";
  map = { run, ...await request(`api/map?run=${run}&axes=${axes}`) };
  const names = axes === "pca" ? ["1st", "2nd"] : order.slice(0, 2).map((d) => `z${d}`);
  const shares = names.map((name, axis) => `${name} ${Math.round(100 * map.share?.[axis])} %`);
  $("share").textContent = map.axes ? `Variance of the posterior means: ${shares.join(", ")}`
    : `t-SNE of the first ${map.points.length.toLocaleString("en")} test images`;
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
  const context = back.getContext("2d"), values = getFactor(), colors = chooseColors(values);
  context.scale(ratio, ratio);
  context.globalAlpha = 0.75;
  map.points.forEach((point, index) => {
    if (onlyLabel !== null && values[index] !== onlyLabel) return;
    const [x, y] = toScreen(point);
    context.fillStyle = colors.get(values[index]);
    context.fillRect(x - 1.25, y - 1.25, 2.5, 2.5);
  });
  const words = $("axes").selectedOptions[0].textContent;
  back.setAttribute("aria-label", `Map of ${map.points.length} test images by ${words}; choose one by a click or its number`);
  drawMarks();
}

export function drawMarks() {
  if (map?.run !== page.lead || !map.scale) return; // the map of another run is still shown
  const context = $("map").children[1].getContext("2d"), ratio = devicePixelRatio || 1;
  const style = getComputedStyle(document.body), { start, end } = page.ends;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, map.width, map.height);
  context.font = "bold 13px sans-serif";
  const mark = (point, text) => {
    const [x, y] = toScreen(point);
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
  if (!map.axes) { // a t-SNE has places for its images only
    if (page.index !== null && page.index < map.points.length) mark(map.points[page.index], "");
    return;
  }
  if (start && end) {
    Object.assign(context, { lineWidth: 1.5, strokeStyle: style.color });
    context.setLineDash([4, 4]);
    context.beginPath();
    for (const { z } of [start, end]) context.lineTo(...toScreen(project(z[page.lead])));
    context.stroke();
    context.setLineDash([]);
    mark(project(start.z[page.lead]), "start");
    mark(project(end.z[page.lead]), "end");
  }
  mark(project(page.z[page.lead]), "");
}

/** Find the number of the test image nearest to a click; null if none is shown. */
export function findNearest(event) {
  if (!map) return null;
  let best = null, distance = Infinity;
  map.points.forEach((point, index) => {
    if (onlyLabel !== null && getFactor()[index] !== onlyLabel) return;
    const [x, y] = toScreen(point), d = Math.hypot(x - event.offsetX, y - event.offsetY);
    if (d < distance) [best, distance] = [index, d];
  });
  return best;
}

export function makeLegend() {
  onlyLabel = null;
  $("legend").replaceChildren(...[...chooseColors(getFactor())].map(([value, color]) => {
    const dot = create("i");
    dot.style.background = color;
    const button = create("button", { type: "button", ariaPressed: "false" }, dot, page.state.classes?.[value] ?? `${value}`);
    button.addEventListener("click", () => {
      onlyLabel = onlyLabel === value ? null : value;
      for (const each of $("legend").children) each.ariaPressed = String(each === button && onlyLabel !== null);
      drawMap();
    });
    return button;
  }));
}
