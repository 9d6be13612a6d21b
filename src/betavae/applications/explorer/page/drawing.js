// Pictures of the user's own: drawn or uploaded, and read anew when a box that says how is ticked.
import { $, page, say } from "./common.js";

/** `read(blob, caption, query)` is called with each picture, `cleared()` when the drawing is wiped. */
export function makeDrawing(read, cleared) {
  const [channels, height, width] = page.state.shape, canvas = $("drawing"), scale = Math.ceil(280 / Math.max(height, width));
  [canvas.width, canvas.height] = [scale * width, scale * height];
  const context = canvas.getContext("2d");
  let last = null, own = null; // where the pen is down, and the picture

  const reread = () => {
    if (!own) return;
    const invert = own.caption === "upload" && $("invert").checked;
    read(own.blob, own.caption, `centre=${$("centre").checked}&invert=${invert}`);
  };
  const wipe = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    $("hint").hidden = false;
    own = null;
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  };
  const stroke = (event) => {
    const points = event.getCoalescedEvents?.() ?? [];
    for (const each of points.length ? points : [event]) {
      const next = at(each);
      context.beginPath();
      context.moveTo(...last);
      context.lineTo(...next);
      context.stroke();
      last = next;
    }
    canvas.toBlob((blob) => { own = { blob, caption: "drawing" }; reread(); });
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    const strokeStyle = channels === 3 ? $("ink").value : "#fff";
    Object.assign(context, { lineWidth: 0.075 * canvas.width, lineCap: "round", lineJoin: "round", strokeStyle });
    $("hint").hidden = true;
    last = at(event);
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  $("clear").addEventListener("click", () => { wipe(); cleared(); });
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (!file) return;
    if (file.size > page.state.upload) return say(`That file is too large: ${page.state.upload / 2 ** 20} MB are the most.`);
    own = { blob: file, caption: "upload" };
    reread();
  });
  for (const box of ["centre", "invert"]) $(box).addEventListener("change", reread);
  $("centre").checked = page.state.shape.join() === "1,28,28" && page.state.data.includes("mnist");
  $("ink-label").hidden = channels !== 3;
  wipe();
}
