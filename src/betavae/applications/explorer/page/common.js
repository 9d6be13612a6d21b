// Shared by the modules of the page: state, requests to the server, images on canvases.
export const $ = (id) => document.getElementById(id);

// `state` is from the server. `z` has one latent per run, in that model's own order of dimensions. The sliders and the
// map show the run number `lead`. `index` is the number of the chosen test image, if one is. `ends` are the ends of the path.
export const page = { state: null, z: [], lead: 0, index: null, ends: { start: null, end: null } };

export async function request(url, body, kind = "application/json") {
  const json = kind === "application/json";
  const response = await fetch(url, body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": kind }, body: json ? JSON.stringify(body) : body,
  });
  const content = await response.json().catch(() => ({ error: response.statusText }));
  if (!response.ok) throw new Error(content.error);
  return content;
}

/** The number of the chosen label for conditional models, else null. */
export const getLabel = () => (page.state.conditions.length ? $("label").selectedIndex : null);

export function showMessage(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// Wrap a function so that calls during a running one are dropped, except the last.
export function runLatest(work) {
  let pending = null, busy = false;
  return async (...args) => {
    pending = args;
    if (busy) return;
    busy = true;
    while (pending) {
      const now = pending;
      pending = null;
      try {
        await work(...now);
        showMessage("");
      } catch (error) {
        showMessage(error instanceof TypeError ? "The server does not respond; check that it is running." : error.message);
      }
    }
    busy = false;
  };
}

function decodePixels(text) {
  const [channels, height, width] = page.state.shape, bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[channels * i + (channels === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  return image;
}

export function draw(canvas, text, column = 0) {
  canvas.getContext("2d").putImageData(decodePixels(text), column * page.state.shape[2], 0);
}

export function setSize(canvas, columns = 1) {
  [canvas.width, canvas.height] = [columns * page.state.shape[2], page.state.shape[1]];
  return canvas;
}

export function create(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
