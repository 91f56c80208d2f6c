// ---- main.js: the state of the page, and the functions that draw it.

/** The head with the highest score, to begin with. */
function bestHead(lens, index) {
  const scores = lens.arrays.head_scores.row(index);
  const best = ranked(Array.from(scores))[0];
  const { num_heads: N } = lens.model;
  return { layer: Math.floor(best / N), head: best % N };
}

/** Applies a change; the source stays one that the query sees. */
function settled(lens, before, change) {
  const state = { ...before, ...change };
  const first = lens.firstSeen(state.layer, state.query);
  if ("source" in change) state.source = clamp(state.source, first, state.query);
  else if (["query", "layer", "head"].some((name) => state[name] !== before[name])) {
    const look = lens.look(state.layer, state.head, state.query);
    state.source = look.sources[ranked(look.weights)[0]];
  }
  return state;
}

function describe(lens) {
  const { num_layers: L, num_heads: N, num_kv_heads: K, head_dim: H, embed_dim: D, vocab_size: V, positions, num_params: P } = lens.model;
  const grouped = K < N ? ` (${K} of keys and values)` : "";
  const count = (number) => number.toLocaleString("en");
  document.getElementById("facts").textContent = `A decoder-only transformer: ${L} layers of ${N} heads${grouped}, head width ${H}, model width ${D}; ${positions === "none" ? "no" : positions} positions; `
    + `a vocabulary of ${count(V)} tokens; ${count(P)} parameters.`;
}

/** Light or dark: as the system, until the button is pressed. */
function makeTheme(redraw) {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const isDark = () => (chosen === null ? system.matches : chosen === "dark");
  const show = () => {
    if (chosen !== null) document.documentElement.dataset.theme = chosen;
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    button.removeAttribute("aria-pressed");
    redraw();
  };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** Keys that work anywhere on the page. */
function makeKeys(lens, choose) {
  const counts = { query: lens.numTokens, layer: lens.model.num_layers, head: lens.model.num_heads };
  const keys = { t: ["query", 1], T: ["query", -1], h: ["head", 1], H: ["head", -1], l: ["layer", 1], L: ["layer", -1] };
  document.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.altKey || event.ctrlKey || event.metaKey) return;
    const [name, by] = keys[event.key];
    choose((state) => ({ [name]: clamp(state[name] + by, 0, counts[name] - 1) }));
  });
}

async function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const lens = new Lens(data, await unpackAll(data.arrays));
  let draw = [];
  let state = { query: 0, layer: -1, head: -1, source: 0, score: "previous_token", target: "first", opened: null, showsAll: false, snapshot: lens.history ? lens.history.steps.length - 1 : 0 };

  const redraw = () => {
    const look = lens.look(state.layer, state.head, state.query);
    for (const part of draw) part(state, look);
  };
  const choose = (change) => {
    state = settled(lens, state, typeof change === "function" ? change(state) : change);
    redraw();
  };

  describe(lens);
  draw = [
    makeChooser(document.getElementById("chooser"), lens, choose),
    makePrompt(document.getElementById("prompt"), lens, choose),
    makeAnswers(document.getElementById("answers"), lens),
    makeHeads(lens, choose),
    makeHeadPattern(lens, choose),
    makeStory(document.getElementById("story"), lens, choose),
    makeWhy(document.getElementById("why"), lens, choose),
    makeLayers(lens),
    makeLearning(lens, choose),
  ];
  state = settled(lens, state, { ...bestHead(lens, 0), query: lens.numTokens - 1 });
  document.getElementById("loading").remove();
  document.getElementById("main").hidden = false;
  makeTheme(redraw);
  makeKeys(lens, choose);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  document.getElementById("facts").textContent = `The page cannot be shown: ${error.message}`;
  throw error;
});
