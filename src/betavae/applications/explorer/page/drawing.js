// The user's pictures, drawn or uploaded; they are sent again when an option changes.
import { $, getLabel, page, showMessage } from "./common.js";

/**
 * Call `read(blob, caption, query)` with each picture, and `cleared()` when the drawing is cleared.
 * Return a function that reads the last picture again.
 */
export function makeDrawing(read, cleared) {
  const [channels, height, width] = page.state.shape, canvas = $("drawing"), scale = Math.ceil(280 / Math.max(height, width));
  [canvas.width, canvas.height] = [scale * width, scale * height];
  const context = canvas.getContext("2d");
  let last = null, picture = null; // position of the pen, and the last picture

  const readAgain = () => {
    if (!picture) return;
    const invert = picture.caption === "upload" && $("invert").checked;
    const label = getLabel() === null ? "" : `&label=${getLabel()}`;
    read(picture.blob, picture.caption, `center=${$("center").checked}&invert=${invert}${label}`);
  };
  const clear = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    $("hint").hidden = false;
    picture = null;
  };
  const locate = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  };
  const stroke = (event) => {
    const points = event.getCoalescedEvents?.() ?? [];
    for (const each of points.length ? points : [event]) {
      const next = locate(each);
      context.beginPath();
      context.moveTo(...last);
      context.lineTo(...next);
      context.stroke();
      last = next;
    }
    canvas.toBlob((blob) => { picture = { blob, caption: "drawing" }; readAgain(); });
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    const strokeStyle = channels === 3 ? $("ink").value : "#fff";
    Object.assign(context, { lineWidth: 0.075 * canvas.width, lineCap: "round", lineJoin: "round", strokeStyle });
    $("hint").hidden = true;
    last = locate(event);
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  $("clear").addEventListener("click", () => { clear(); cleared(); });
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (!file) return;
    const limit = page.state.max_upload_bytes;
    if (file.size > limit) return showMessage(`The file is too large: expected at most ${limit / 2 ** 20} MB.`);
    picture = { blob: file, caption: "upload" };
    readAgain();
  });
  for (const box of ["center", "invert"]) $(box).addEventListener("change", readAgain);
  $("center").checked = page.state.shape.join() === "1,28,28" && page.state.data.includes("mnist");
  $("ink-label").hidden = channels !== 3;
  clear();
  return readAgain;
}
