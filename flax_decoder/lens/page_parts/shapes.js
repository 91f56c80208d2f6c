// ---- shapes.js: elements and small charts. Token text is inserted as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) element.setAttribute(name, value); // "false" is a value there
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** make("p", {class: "muted"}, "text", element): an HTML element. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// Characters that are invisible or change their neighbours: controls, directions, joiners, unusual spaces.
const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}|^\p{M}/u;
const NAMES = { " ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };

/** The text of a token as pieces to show; every invisible character is a piece with its name. */
function visiblePieces(text) {
  const pieces = [];
  for (const character of text) {
    const name = NAMES[character] ?? (UNSEEN.test(character) ? codeName(character) : null);
    const last = pieces.at(-1);
    if (name === null && last && !last.isName) last.text += character;
    else pieces.push({ text: name ?? character, isName: name !== null });
  }
  return pieces.length > 0 ? pieces : [{ text: "(empty)", isName: true }];
}

function codeName(character) {
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

/** A token's text by itself. */
function tokenText(text) {
  return make("bdi", { class: "token" }, ...visiblePieces(text).map((piece) =>
    piece.isName ? make("span", { class: "unseen" }, piece.text) : piece.text));
}

/** A token's text in a sentence, set off from the words around it. */
function tokenWord(text) {
  return make("span", { class: "word" }, tokenText(text));
}

/** The same as plain text, for screen readers. */
function spoken(text) {
  const words = { " ": "space", "\n": "newline", "\t": "tab", "\r": "carriage return" };
  return words[text] ?? visiblePieces(text).map((piece) => piece.text).join("");
}

/** A vector as bars: up is positive, down is negative; `most` is the number that a full bar shows. */
function strip(vector, most, label) {
  const height = 12;
  const width = vector.length;
  const paths = { positive: "", negative: "" };
  vector.forEach((number, h) => {
    const bar = clamp((number / (most || 1)) * height, -height, height);
    paths[number < 0 ? "negative" : "positive"] += `M${h + 0.1},${height}h.8v${(-bar).toFixed(2)}h-.8z`;
  });
  return makeSvg("svg", { class: "strip", viewBox: `0 0 ${width} ${2 * height}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    makeSvg("path", { class: "axis", d: `M0,${height}h${width}`, "vector-effect": "non-scaling-stroke" }),
    makeSvg("path", { class: "positive", d: paths.positive }),
    makeSvg("path", { class: "negative", d: paths.negative }));
}

/** All numbers of a vector, collapsed. */
function allNumbers(vector, digits) {
  const list = () => make("code", { class: "numbers" }, "[" + Array.from(vector, (number) => fixed(number, digits)).join(", ") + "]");
  const details = make("details", { class: "all-numbers" }, make("summary", {}, `all ${vector.length} numbers`));
  details.addEventListener("toggle", () => details.open && details.children.length === 1 && details.append(list()));
  return details;
}

/** A bar from `from` to `to` on an axis from `low` to `high`; hatched if negative. */
function spanBar(from, to, low, high) {
  const scale = 100 / (high - low || 1);
  const zero = clamp((0 - low) * scale, 0, 100);
  const left = (Math.min(from, to) - low) * scale;
  return make("span", { class: "bar-track", "aria-hidden": "true" },
    make("span", { class: "bar-zero", style: `left:${zero.toFixed(2)}%` }),
    make("span", { class: to < from ? "bar negative" : "bar positive", style: `left:${left.toFixed(2)}%;width:${(Math.abs(to - from) * scale).toFixed(2)}%` }));
}

/** Replaces the content of a box; the focus stays on the element of the same data-key. */
function rebuild(box, ...children) {
  const key = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  box.replaceChildren(...children);
  if (key !== undefined) box.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

/** Calls act(move) for the keys of `moves`, unless a modifier is pressed. */
function onKeys(element, moves, act) {
  element.addEventListener("keydown", (event) => {
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act(moves[event.key]);
  });
}

/** A row of radio buttons. */
function choices(box, name, options, chosen, onChoose) {
  rebuild(box, ...options.map(([value, ...label]) => make("label", { class: value === chosen ? "chosen" : "" },
    make("input", { type: "radio", name, value, checked: value === chosen, "data-key": value, onchange: () => onChoose(value) }),
    make("span", {}, ...label))));
}

/** The colours of shares from 0 to 1 in the current theme: 256 times red, green, blue and opacity. */
function rampColours() {
  const style = getComputedStyle(document.documentElement);
  const context = Object.assign(document.createElement("canvas"), { width: 256, height: 1 }).getContext("2d");
  const gradient = context.createLinearGradient(0, 0, 256, 0);
  ["--ramp-low", "--ramp-middle", "--ramp-high"].forEach((name, i) => gradient.addColorStop(i / 2, style.getPropertyValue(name).trim()));
  context.fillStyle = gradient;
  context.fillRect(0, 0, 256, 1);
  return context.getImageData(0, 0, 256, 1).data;
}
