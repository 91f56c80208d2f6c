// ---- heads.js: the map of all heads.

const MEANINGS = {
  previous_token: ["previous token", "The share of attention that goes to the token just before."],
  first_token: ["first token", "The share of attention that goes to the first token: a common resting place of heads."],
  induction: ["induction", "The share of attention that goes to the token after an earlier copy of this one: what came next the last time."],
  same_token: ["same token", "The share of attention that goes to earlier copies of this token."],
};

/** A grid with a cell per head; draw(state, numberOf) fills it. */
function makeHeadGrid(box, lens, choose, label) {
  const { num_layers: L, num_heads: N } = lens.model;
  const grid = make("div", { class: "heads", role: "grid", "aria-label": label, style: `--columns:${N}` });
  const line = (...cells) => grid.append(make("div", { role: "row", class: "heads-row" }, ...cells));
  line(make("span", { class: "axis", role: "columnheader" }, make("span", { class: "visually-hidden" }, "layer")),
    ...Array.from({ length: N }, (_, head) => make("span", { class: "axis", role: "columnheader" }, head === 0 ? "head 0" : `${head}`)));
  const cells = [];
  for (let layer = 0; layer < L; layer++) {
    const row = Array.from({ length: N }, (_, head) =>
      make("button", { type: "button", role: "gridcell", class: "head-cell", "data-head": `${layer}.${head}`, onclick: () => choose({ layer, head }) }));
    cells.push(row);
    line(make("span", { class: "axis", role: "rowheader" }, `layer ${layer}`), ...row);
  }
  const moves = {
    ArrowLeft: { head: -1 }, ArrowRight: { head: 1 }, ArrowUp: { layer: -1 }, ArrowDown: { layer: 1 },
    Home: { head: -N }, End: { head: N },
  };
  onKeys(grid, moves, (move) => {
    choose((state) => ({ layer: clamp(state.layer + (move.layer ?? 0), 0, L - 1), head: clamp(state.head + (move.head ?? 0), 0, N - 1) }));
    grid.querySelector('[aria-selected="true"]').focus();
  });
  box.append(grid);
  return (state, numberOf) => {
    cells.forEach((row, layer) => row.forEach((cell, head) => {
      const number = numberOf(layer, head);
      const isChosen = layer === state.layer && head === state.head;
      const text = number < 0 ? "\u2013" : fixed(number, 2);
      cell.textContent = text.replace(/^0\./, ".");
      cell.style.setProperty("--share", clamp(number, 0, 1));
      cell.classList.toggle("strong", number > STRONG);
      cell.setAttribute("aria-selected", isChosen);
      cell.setAttribute("aria-label", `layer ${layer}, head ${head}: ${number < 0 ? "does not apply to this text" : text}`);
      cell.tabIndex = isChosen ? 0 : -1;
    }));
  };
}

function makeHeads(lens, choose) {
  const draw = makeHeadGrid(document.getElementById("heads"), lens, choose, "All heads; pick one");
  const names = Object.keys(MEANINGS);
  return (state) => {
    choices(document.getElementById("heads-choice"), "score", names.map((name) => [name, MEANINGS[name][0]]), state.score, (score) => choose({ score }));
    document.getElementById("heads-meaning").textContent = MEANINGS[state.score][1];
    const index = names.indexOf(state.score);
    draw(state, (layer, head) => lens.arrays.head_scores.at(index, layer, head));
  };
}
