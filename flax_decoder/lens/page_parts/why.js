// ---- why.js: a logit as the sum of contributions, and the predictions after each layer.

const NAMED_PARTS = 10;
const NAMED_SOURCES = 5;
const SHOWN_GUESSES = 5;

/** The largest parts, and one for all others. */
function gathered(parts, count, nameOfRest) {
  const order = ranked(parts.map((part) => part.value), Math.abs);
  const named = order.slice(0, count).map((i) => parts[i]);
  const rest = order.slice(count).map((i) => parts[i]);
  if (rest.length <= 1) return [...named, ...rest];
  return [...named, { label: nameOfRest(rest.length), value: rest.reduce((sum, part) => sum + part.value, 0), isRest: true }];
}

function waterfallRow(part, from, range, attributes, ...name) {
  return make("li", { class: "part", ...attributes }, make("span", { class: "part-name" }, ...name), spanBar(from, from + part.value, ...range), make("span", { class: "number" }, signed(part.value, 3)));
}

/** The rows of an expanded head: its contribution by source. */
function sourceRows(lens, state, part, from, range) {
  const sources = lens.sourceParts(state.target, part.layer, part.head, state.query).map((source) => ({ ...source, label: source.source }));
  let running = from;
  return gathered(sources, NAMED_SOURCES, (count) => `the other ${count} tokens`).map((source) => {
    const row = waterfallRow(source, running, range, { class: "part inner" }, ...(source.isRest ? [source.label] : ["from ", tokenAt(lens, source.source)]));
    running += source.value;
    return row;
  });
}

function makeWaterfall(lens, state, choose) {
  const parts = gathered(lens.logitParts(state.target, state.query), NAMED_PARTS, (count) => `all ${count} others`);
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  const points = parts.reduce((points, part) => [...points, points.at(-1) + part.value], [0]);
  const range = [Math.min(...points, total), Math.max(...points, total)];
  const rows = parts.flatMap((part, i) => {
    const key = `${part.layer}.${part.head}`;
    if (part.head === undefined) return [waterfallRow(part, points[i], range, {}, part.label)];
    const isOpen = state.opened === key;
    const button = make("button", { type: "button", class: "opener", "data-key": `part-${key}`, "aria-expanded": isOpen, onclick: () => choose({ opened: isOpen ? null : key }) }, part.label);
    return [waterfallRow(part, points[i], range, { "data-part": key }, button), ...(isOpen ? sourceRows(lens, state, part, points[i], range) : [])];
  });
  const logit = lens.logit(state.target, state.query);
  rows.push(make("li", { class: "part total" }, make("span", { class: "part-name" }, "the sum of all parts"), spanBar(0, total, ...range), make("span", { class: "number", id: "parts-sum" }, signed(total, 3))),
    make("li", { class: "part total" }, make("span", { class: "part-name" }, state.target === "difference" ? "the model\u2019s own difference of logits" : "the model\u2019s own logit"), spanBar(0, logit, ...range), make("span", { class: "number", id: "logit" }, signed(logit, 3))));
  return make("ul", { class: "parts waterfall", id: "waterfall" }, ...rows);
}

function makeWhy(box, lens, choose) {
  const choice = make("div", { class: "choice", role: "radiogroup", "aria-label": "Which logit" });
  const sentence = make("p", { class: "muted" });
  const chart = make("div");
  box.append(choice, sentence, chart);
  return (state) => {
    const [first, second] = lens.targets(state.query);
    const isNext = state.query + 1 < lens.numTokens && lens.tokens[state.query + 1] === second;
    const name = (token) => tokenWord(lens.texts[token]);
    choices(choice, "target", [["first", "likeliest: ", name(first)], ["second", isNext ? "what really came: " : "second: ", name(second)], ["difference", name(first), ` ${MINUS} `, name(second)]], state.target, (target) => choose({ target }));
    const subject = state.target === "difference" ? ["How much higher is the logit of ", name(first), " than that of ", name(second)] : ["What makes the logit of ", name(state.target === "first" ? first : second)];
    sentence.replaceChildren(...subject, " behind ", tokenAt(lens, state.query), "? The largest parts first; open a head to see from which tokens it took its part.");
    rebuild(chart, makeWaterfall(lens, state, choose));
  };
}

function makeLayers(lens) {
  const box = document.getElementById("layers");
  return (state) => {
    const { num_layers: L } = lens.model;
    document.getElementById("layers-meaning").replaceChildren("What would the model guess behind ", tokenAt(lens, state.query), ", if it stopped after a layer? (The final norm and the head, applied to what the token holds there: the \u201clogit lens\u201d.)");
    const really = lens.tokens[state.query + 1];
    const row = (layer) => make("tr", { "data-layer": layer }, make("th", { scope: "row" }, layer === 0 ? "embedding" : `layer ${layer - 1}`),
      ...Array.from(lens.arrays.guess_tokens.row(layer, state.query)).slice(0, SHOWN_GUESSES).map((token, place) => {
        const share = lens.arrays.guess_shares.at(layer, state.query, place);
        return make("td", { class: token === really ? "guess came" : "guess", style: `--share:${share}`, title: token === really ? "this token really came next" : "" },
          tokenText(lens.texts[token]), token === really ? make("span", { class: "tick", "aria-label": "it came next" }, "\u2713") : "", make("span", { class: "number" }, percent(share)));
      }));
    const count = Math.min(SHOWN_GUESSES, lens.arrays.guess_tokens.shape[2]);
    const ordinals = ["likeliest", "second", "third", "fourth", "fifth"];
    rebuild(box, make("table", { class: "guesses" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "after"), ...ordinals.slice(0, count).map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...Array.from({ length: L + 1 }, (_, layer) => row(layer)))));
  };
}
