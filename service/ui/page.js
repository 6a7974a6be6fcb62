"use strict";

const at = (id) => document.getElementById(id);
const number = (value, digits) => (value === null ? "-" : value.toFixed(digits));
const percent = (share) => `${(100 * share).toFixed(1)} %`;
let model = null;
let chosen = null; // the file that is shown
let asked = 0; // the newest question: answers to older ones are left unshown

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function row(cells) {
  const made = document.createElement("tr");
  for (const [text, kind] of cells) made.append(element("td", text, kind));
  return made;
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer, or refused the file before reading it.");
  }
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}

function tell(problem) {
  at("problem").hidden = !problem;
  at("problem").textContent = problem || "";
}

// Asks, and shows the answer unless something else was asked meanwhile.
async function question(words, path, show) {
  const mine = ++asked;
  tell("");
  at("status").textContent = words;
  try {
    const said = await ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: chosen,
    });
    if (mine === asked) show(said);
  } catch (error) {
    if (mine === asked) tell(error.message);
  }
  if (mine === asked) at("status").textContent = "";
  watch();
}

async function take(file) {
  if (!file) return;
  at("results").replaceChildren();
  at("attack-fields").disabled = true;
  chosen = null;
  if (!model) await begin(); // dropped before the page knew the model
  if (!model) return;
  if (file.size > model.max_upload_bytes) {
    asked++;
    const most = model.max_upload_bytes / 2 ** 20;
    tell(`Expected an image file of at most ${most} MiB, got ${(file.size / 2 ** 20).toFixed(0)} MiB.`);
    return;
  }
  chosen = file;
  await question(`Looking at ${file.name}…`, "/api/explain", (said) => {
    at("results").replaceChildren(result(`${file.name}: as it came`, said));
    at("attack-fields").disabled = false;
  });
}

async function attack(event) {
  event.preventDefault();
  const method = at("method").value;
  const levels = at("levels").value;
  const words = `${method.toUpperCase()} with ε = ${levels} of 255`;
  await question(`${words}…`, `/api/attack?method=${method}&levels=${levels}`, (said) => {
    const results = at("results");
    while (results.children.length > 1) results.lastChild.remove();
    results.append(result(`After ${words}`, said));
  });
}

function result(title, said) {
  const made = at("result").content.cloneNode(true);
  const part = (selector) => made.querySelector(selector);
  part("h2").textContent = title;
  part("img").src = said.image;
  part("img").alt = `${title}, taken for ${said.label}`;
  const adversarial = said.verdict === "ADVERSARIAL";
  const facts = [
    ["verdict", adversarial ? "adversarial" : "clean", `verdict ${adversarial ? "adversarial" : "clean"}`],
    ["label", said.likeliest.map(([name, share]) => `${name} ${percent(share)}`).join(", ")],
    ["p-value", `${number(said.p_value, 4)} (flagged at ${said.max_false_alarm_rate} and below)`],
    ["score", number(said.score, 2)],
    ["path is most like", said.resembles],
    ["least usual filters set right", said.label_with_these_set_right],
    [adversarial ? "restored label (a guess)" : "on a usual path", said.restored_label],
  ];
  const near = said.nearest_usual_path;
  if (near) facts.push(["nearest usual path", `${near.label}, training image ${near.image}, ${near.distance} filters`]);
  if (said.resized) facts.push(["note", "the image was resized"]);
  for (const [name, text, kind] of facts) part("dl").append(element("dt", name), element("dd", text, kind));
  draw(part("svg"), said);
  for (const state of said.least_usual_filters) {
    part(".filters tbody").append(
      row([
        [state.layer],
        [String(state.filter)],
        [state.open ? "open" : "closed"],
        [percent(state.usually_open)],
        [number(state.part, 3)],
      ]),
    );
  }
  if (!said.least_usual_filters.length) {
    part(".filters").replaceWith(element("p", "None: every filter is as for most images of the class."));
  }
  for (const layer of said.layers) {
    part(".layers tbody").append(
      row([
        [layer.layer],
        [`${layer.open} of ${layer.filters}`],
        [String(layer.unusual)],
        [number(layer.surprise, 1)],
        [number(layer.usual_surprise, 1)],
        [number(layer.part, 3)],
      ]),
    );
  }
  for (const [name, value] of Object.entries(said.parts)) {
    if (said.layers.some((layer) => layer.layer === name)) continue;
    part(".layers tbody").append(row([[name], [""], [""], [""], [""], [number(value, 3)]]));
  }
  part(".layers tbody").append(row([["an average image"], [""], [""], [""], [""], [number(said.base, 3)]]));
  return made;
}

// The image's path on the left and the usual path of its label on the right, a square for each filter.
function draw(svg, said) {
  const perRow = 16;
  const cell = 10;
  const left = 118;
  const gap = 24;
  const across = perRow * cell;
  let y = 18;
  let start = 0;
  const parts = [];
  const text = (x, height, words) => parts.push(["text", { x, y: height }, words]);
  text(left, 12, "this image");
  text(left + across + gap, 12, `usual for ${said.label}`);
  const flagged = new Set(said.least_usual_filters.map((state) => `${state.layer}/${state.filter}`));
  for (const [name, width] of Object.entries(model.layers)) {
    text(0, y + 9, name.length > 18 ? `…${name.slice(-17)}` : name);
    for (let place = 0; place < width; place++) {
      const own = said.path[start + place] === "1";
      const usual = said.usual_path[start + place] === "1";
      const x = left + (place % perRow) * cell;
      const top = y + Math.floor(place / perRow) * cell;
      const kind = own === usual ? (own ? "open" : "closed") : own ? "opened" : "shut";
      const size = { y: top, width: cell - 1, height: cell - 1 };
      parts.push(["rect", { x, ...size, class: kind }]);
      parts.push(["rect", { x: x + across + gap, ...size, class: usual ? "open" : "closed" }]);
      if (flagged.has(`${name}/${place}`)) parts.push(["rect", { x, ...size, class: "frame" }]);
    }
    start += width;
    y += Math.ceil(width / perRow) * cell + 6;
  }
  const differ = [...said.path].filter((bit, place) => bit !== said.usual_path[place]).length;
  svg.setAttribute("width", left + 2 * across + gap);
  svg.setAttribute("height", y);
  const words = `${differ} of ${said.path.length} filters differ from the usual path of ${said.label}`;
  svg.setAttribute("aria-label", words);
  for (const [name, attributes, inner] of parts) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (inner) made.textContent = inner;
    svg.append(made);
  }
}

async function watch() {
  try {
    const said = await ask("/api/recent");
    at("rates").textContent =
      `${said.images_in_window} images in the last ${said.window_seconds} s, ${said.flagged_in_window} of them ` +
      `adversarial; ${said.images} and ${said.flagged} since the server started.`;
    at("recent").replaceChildren(
      ...said.verdicts.map((one) =>
        row([
          [one.seconds_ago.toFixed(0)],
          [one.source, "text"],
          [one.label, "text"],
          [number(one.p_value, 4)],
          [one.adversarial ? "adversarial" : "clean", `verdict ${one.adversarial ? "adversarial" : "clean"}`],
        ]),
      ),
    );
  } catch (error) {
    at("rates").textContent = error.message;
  }
}

async function begin() {
  try {
    model = await ask("/api/model");
    const colour = model.channels === 1 ? "grey" : "RGB";
    at("model").textContent =
      `${model.name} (${model.version}): images of ${model.height} x ${model.width} ${colour}` +
      `${model.resize ? ", others are resized" : ""}; classes ${model.classes.join(", ")}.`;
    at("levels").max = model.max_levels;
  } catch (error) {
    at("model").textContent = "";
    tell(error.message);
  }
}

const drop = at("drop");
drop.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    at("file").click();
  }
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
at("file").addEventListener("change", () => {
  take(at("file").files[0]);
  at("file").value = ""; // the same file can be chosen again
});
at("attack").addEventListener("submit", attack);
at("levels").addEventListener("input", () => {
  at("levels-said").textContent = `${at("levels").value} of 255`;
});
begin();
watch();
setInterval(() => document.hidden || watch(), 2000);
