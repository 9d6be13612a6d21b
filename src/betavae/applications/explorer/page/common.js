// What the parts of the page share: the state, questions to the server, pictures on canvases.
export const $ = (id) => document.getElementById(id);

// `state` is the server's. A latent is in a model's own order of dimensions; `z` has one for each run. `lead` is the run
// whose values the sliders and the map show, `ends` are those of the path.
export const page = { state: null, z: [], lead: 0, ends: { start: null, end: null } };

export async function ask(url, body, kind = "application/json") {
  const json = kind === "application/json";
  const answer = await fetch(url, body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": kind }, body: json ? JSON.stringify(body) : body,
  });
  const content = await answer.json().catch(() => ({ error: answer.statusText }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

export function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// Of several wishes that come while one is answered, only the last is worth an answer.
export function latest(work) {
  let wish = null, busy = false;
  return async (...wanted) => {
    wish = wanted;
    if (busy) return;
    busy = true;
    while (wish) {
      const now = wish;
      wish = null;
      try {
        await work(...now);
        say("");
      } catch (error) {
        say(error instanceof TypeError ? "The server does not answer: is it still running?" : error.message);
      }
    }
    busy = false;
  };
}

function pixels(text) {
  const [channels, height, width] = page.state.shape, bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const picture = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = bytes[channels * i + (channels === 3 ? c : 0)];
    picture.data[4 * i + 3] = 255;
  }
  return picture;
}

export function draw(canvas, text, column = 0) {
  canvas.getContext("2d").putImageData(pixels(text), column * page.state.shape[2], 0);
}

export function sized(canvas, columns = 1) {
  [canvas.width, canvas.height] = [columns * page.state.shape[2], page.state.shape[1]];
  return canvas;
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
