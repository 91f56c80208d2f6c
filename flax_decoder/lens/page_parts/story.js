// ---- story.js: one query of one head, step by step, formulas beside numbers.

const FIRST_ROWS = 8;
const NAMED_DIMENSIONS = 8;
const ORIGIN_NAMES = { token: "token", position: "position", heads: "heads", feed_forward: "feed-forward", bias: "biases" };

function largest(vectors) {
  return vectors.reduce((most, vector) => vector.reduce((most, number) => Math.max(most, Math.abs(number)), most), 0);
}

/** A numbered step: title, formula and numbers. */
function storyStep(title, formula, ...content) {
  return make("li", {}, make("div", { class: "step-head" }, make("h3", {}, title), make("code", { class: "formula" }, formula)), ...content);
}

function vectorRow(label, vector, most, digits) {
  return make("div", { class: "vector" }, make("span", { class: "vector-name" }, ...label), strip(vector, most, `${vector.length} numbers`), allNumbers(vector, digits));
}

function queryStep(lens, state) {
  const { positions, qk_norm: norm, head_dim: H, has_query_bias: hasBias } = lens.model;
  const isNormed = ["pre", "both"].includes(lens.model.norm_position);
  const q = lens.query(state.layer, state.head, state.query);
  const turned = positions === "rotary" ? " Positions are rotary here: q and k are shown as they meet, already turned by an angle that grows with the position, so that their match depends on the distance." : "";
  const normed = norm === "none" ? "" : " Both were brought to unit size first (QK-norm).";
  const product = `${isNormed ? "norm(x)" : "x"} W_query${hasBias ? " + b_query" : ""}`;
  return storyStep("The query asks", `q = ${norm === "none" ? product : `norm(${product})`}`,
    make("p", {}, "What ", tokenAt(lens, state.query), ` holds, x, is ${isNormed ? "brought to unit size and " : ""}turned into ${H} numbers, its query. Up is positive, down is negative.`, turned, normed),
    vectorRow(["q"], q, largest([q]), lens.model.digits.q));
}

function scoreFormula(model) {
  let formula = `score = q \u00b7 k \u00d7 ${fixed(model.scale, 4)}`;
  if (model.soft_cap !== null) formula = `score = ${model.soft_cap} tanh(q \u00b7 k \u00d7 ${fixed(model.scale, 4)} / ${model.soft_cap})`;
  return model.slopes === null ? formula : `${formula} + bias`;
}

/** The table of all sources of the query. */
function meetingTable(lens, state, look, choose) {
  const { layer, head, query } = state;
  const isCapped = lens.model.soft_cap !== null;
  const isBiased = lens.model.slopes !== null;
  const isScore = !(isCapped || isBiased);
  const order = state.showsAll ? look.sources.map((_, i) => i) : ranked(look.weights).slice(0, FIRST_ROWS);
  const chosen = look.sources.indexOf(state.source);
  if (!order.includes(chosen)) order.push(chosen);
  const keys = look.sources.map((s) => lens.key(layer, head, s));
  const values = look.sources.map((s) => lens.value(layer, head, s));
  const mostKey = largest(keys);
  const mostValue = largest(values);
  const number = (label, text) => make("td", { class: "number", "data-label": label }, text);
  const row = (i) => {
    const s = look.sources[i];
    const parts = lens.scoreParts(layer, head, query, s, look.scores[i]);
    const pick = make("button", { type: "button", class: "pick", "data-key": `source-${s}`, "aria-pressed": s === state.source, onclick: () => choose({ source: s }) }, tokenAt(lens, s));
    return make("tr", { class: s === state.source ? "chosen" : "", "data-source": s, onclick: () => choose({ source: s }) },
      make("th", { scope: "row" }, pick), make("td", { class: "key", "data-label": "key" }, strip(keys[i], mostKey, "key")),
      number(isScore ? "score" : "q \u00b7 k", fixed(parts.match, 2)), ...(isCapped ? [number("capped", fixed(parts.capped, 2))] : []), ...(isBiased ? [number("bias", signed(parts.bias, 2))] : []),
      ...(isScore ? [] : [number("score", fixed(look.scores[i], 2))]), number("e^(score \u2212 max)", fixed(look.exps[i], 3)),
      make("td", { class: "number weight" }, make("span", { class: "meter", style: `--share:${look.weights[i]}` }), percent(look.weights[i])),
      make("td", { class: "value", "data-label": "value" }, strip(values[i], mostValue, "value")));
  };
  const heading = (...text) => make("th", { scope: "col" }, ...text);
  return make("table", { class: "meeting" },
    make("thead", {}, make("tr", {}, heading("token"), heading("its key k"), heading(isScore ? "score" : "q \u00b7 k \u00d7 scale"),
      ...(isCapped ? [heading("capped")] : []), ...(isBiased ? [heading("bias")] : []), ...(isScore ? [] : [heading("score")]),
      heading("e", make("sup", {}, "score \u2212 max")), heading("weight"), heading("its value v"))),
    make("tbody", {}, ...order.map(row)));
}

function meetStep(lens, state, look, choose) {
  const count = look.sources.length;
  const later = lens.numTokens - 1 - state.query;
  const masked = [later > 0 ? `the ${later} later ${later === 1 ? "token" : "tokens"}` : "", look.first > 0 ? `the first ${look.first}, outside of the window of ${lens.model.windows[state.layer]}` : ""].filter(Boolean);
  const box = make("div", { class: "scroll meeting-box" }, meetingTable(lens, state, look, choose));
  const toggle = count <= FIRST_ROWS ? [] : [make("button", { type: "button", "data-key": "all-rows", class: "more", onclick: () => choose({ showsAll: !state.showsAll }) },
    state.showsAll ? `Show the ${FIRST_ROWS} largest` : `Show all ${count}, in order`)];
  return storyStep(`${count === 1 ? "One key answers" : `${count} keys answer`}`, scoreFormula(lens.model),
    make("p", {}, "Multiply q and k number by number, and add up: the more they agree, the higher the score.",
      lens.model.slopes === null ? "" : " A bias takes off the more, the farther the token stands.",
      masked.length > 0 ? ` Masked, with a score of ${MINUS}\u221e and so a weight of 0: ${masked.join(" and ")}.` : ""),
    box, ...toggle);
}

function softmaxStep(look) {
  const best = ranked(look.weights)[0];
  return storyStep("Scores become shares", "weight = e^(score \u2212 max) / sum",
    make("p", {}, "The largest score is ", make("b", { class: "figure", "data-value": "max" }, fixed(look.max, 2)), ", the exponentials add up to ",
      make("b", { class: "figure", "data-value": "sum" }, fixed(look.sum, 3)), `. So the first share is 1 / ${fixed(look.sum, 3)} = `,
      make("b", { class: "figure" }, percent(look.weights[best])), ", and all shares make 100 %."));
}

/** The score of one source, split by dimension. */
function dimensionsStep(lens, state, look, choose) {
  const { layer, head, query, source } = state;
  const i = look.sources.indexOf(source);
  const parts = lens.scoreParts(layer, head, query, source, look.scores[i]);
  const order = ranked(parts.products, Math.abs);
  const named = order.slice(0, NAMED_DIMENSIONS);
  const rest = parts.match - named.reduce((sum, h) => sum + parts.products[h], 0);
  const most = Math.max(...named.map((h) => Math.abs(parts.products[h])), Math.abs(rest));
  const digits = lens.model.digits;
  const row = (label, formula, value, extra = {}) => make("li", { class: "part", ...extra }, make("span", { class: "part-name" }, ...label, " ", make("span", { class: "muted" }, formula)),
    spanBar(0, value, -most, most), make("span", { class: "number" }, signed(value, 2)));
  const rows = named.map((h) => row([`dimension ${h}`], `${fixed(parts.q[h], digits.q)} \u00d7 ${fixed(parts.k[h], digits.k)} \u00d7 ${fixed(lens.model.scale, 4)}`, parts.products[h], { "data-dimension": h }));
  if (order.length > named.length) rows.push(row([`the other ${order.length - named.length} dimensions`], "", rest));
  const sums = [make("li", { class: "part total" }, make("span", { class: "part-name" }, "q \u00b7 k \u00d7 scale"), make("span"), make("span", { class: "number" }, signed(parts.match, 2)))];
  if (lens.model.soft_cap !== null) sums.push(make("li", { class: "part" }, make("span", { class: "part-name" }, "after the soft cap"), make("span"), make("span", { class: "number" }, signed(parts.capped, 2))));
  if (lens.model.slopes !== null) {
    sums.push(make("li", { class: "part" }, make("span", { class: "part-name" }, `the distance: ${query - source} positions`), make("span"), make("span", { class: "number" }, signed(parts.bias, 2))),
      make("li", { class: "part total" }, make("span", { class: "part-name" }, "score"), make("span"), make("span", { class: "number" }, signed(look.scores[i], 2))));
  }
  return storyStep("Why this score, by dimension", "q \u00b7 k = q\u2080k\u2080 + q\u2081k\u2081 + \u2026",
    make("p", {}, "The score of ", tokenAt(lens, source), " for ", tokenAt(lens, query), ", dimension by dimension, the largest first. Pick another token in the table above.", aboutSign(look.scores[i])),
    make("ul", { class: "parts", id: "dimensions" }, ...rows, ...sums));
}

/** What a negative score means; nothing of a positive one. */
function aboutSign(score) {
  return score < 0 ? " The score is negative: query and key point away from each other more than they agree. For its share of attention only the difference to the other scores counts." : "";
}

/** The score of one source, split by what query and key are made of. */
function originsStep(lens, state, look) {
  const { layer, head, query, source } = state;
  const i = look.sources.indexOf(source);
  const parts = lens.scoreParts(layer, head, query, source, look.scores[i]);
  const origins = lens.scoreOrigins(layer, head, query, source, parts);
  const title = "Why this score, by token and position";
  const formula = "q \u00b7 k = (q_token + q_position + \u2026) \u00b7 (k_token + k_position + \u2026)";
  if (origins === null) {
    const kept = lens.arrays.pair_sources.shape[3];
    return storyStep(title, formula, make("p", { id: "origins" }, `The page keeps this for the ${kept} most attended tokens of each query; pick one of them in the table above.`));
  }
  const distance = `${query - source} ${query - source === 1 ? "position" : "positions"}`;
  const rows = origins.groups.map(({ name, value }) => ({ label: name === "rotation" ? `the turn by their distance, ${distance}` : ORIGIN_GROUPS[name], name, value }));
  if (lens.model.soft_cap !== null) rows.push({ label: "the soft cap", name: "cap", value: parts.capped - parts.match });
  if (lens.model.slopes !== null) rows.push({ label: `the distance, ${distance}`, name: "distance", value: parts.bias });
  const most = Math.max(...rows.map((row) => Math.abs(row.value)), Math.abs(look.scores[i]));
  const bar = (label, value, extra) => make("li", { class: "part", ...extra }, make("span", { class: "part-name" }, label), spanBar(0, value, -most, most), make("span", { class: "number" }, signed(value, 2)));
  const names = lens.model.origins;
  const used = [...names.keys()].filter((o) => layer > 0 || !["heads", "feed_forward"].includes(names[o]));
  const strongest = Math.max(...origins.rows.flat().map(Math.abs)) || 1;
  const cell = (value) => make("td", { class: value < 0 ? "pair negative" : "pair positive", style: `--share:${(Math.abs(value) / strongest).toFixed(3)}` }, signed(value, 2));
  const table = used.length < 2 ? [] : [make("div", { class: "scroll" }, make("table", { class: "pairs" },
    make("caption", {}, `Each part of the query with each part of the key${lens.model.positions === "rotary" ? ", before they are turned" : ""}:`),
    make("thead", {}, make("tr", {}, make("td"), ...used.map((o) => make("th", { scope: "col" }, make("span", { class: "muted" }, "k of "), ORIGIN_NAMES[names[o]])))),
    make("tbody", {}, ...used.map((o) => make("tr", {}, make("th", { scope: "row" }, make("span", { class: "muted" }, "q of "), ORIGIN_NAMES[names[o]]), ...used.map((other) => cell(origins.rows[o][other])))))))];
  return storyStep(title, formula,
    make("p", {}, tokenAt(lens, query), " and ", tokenAt(lens, source), " hold sums: the vector of the token",
      names.includes("position") ? ", that of its position" : "", layer > 0 ? ", what the heads and feed-forward networks of earlier layers wrote" : "", names.includes("bias") ? ", biases" : "",
      ". So the score is a sum, too", used.length < 2 ? "." : " (the divisors of norms are held fixed):"),
    make("ul", { class: "parts", id: "origins" }, ...rows.map((row) => bar(row.label, row.value, { "data-origin": row.name })),
      make("li", { class: "part total" }, make("span", { class: "part-name" }, "score"), make("span"), make("span", { class: "number" }, signed(look.scores[i], 2)))),
    ...table);
}

function valueStep(lens, state, look) {
  const { layer, head } = state;
  const output = lens.headOutput(layer, head, look);
  const order = ranked(look.weights).slice(0, 3);
  const values = order.map((i) => lens.value(layer, head, look.sources[i]));
  const shares = order.map((i, place) => values[place].map((number) => number * look.weights[i]));
  const most = largest([...shares, output]);
  const rows = order.map((i, place) => vectorRow([percent(look.weights[i]), " of the v of ", tokenAt(lens, look.sources[i])], shares[place], most, lens.model.digits.v));
  const more = look.sources.length - order.length;
  return storyStep("The values are mixed", "out = weight\u2080 v\u2080 + weight\u2081 v\u2081 + \u2026",
    make("p", {}, "Each token hands over its value, in the share of its weight.", more > 0 ? ` The three largest, of ${look.sources.length}:` : ""),
    ...rows, make("div", { class: "sum-row" }, vectorRow([make("b", {}, "out"), more > 0 ? `, with the other ${more}` : ", their sum"], output, most, lens.model.digits.v)));
}

function writeStep(lens, state) {
  const pushed = pushesOf(lens, state);
  const most = Math.max(...pushed.map((push) => Math.abs(push.value)), 0);
  const rows = pushed.filter((push) => push.value !== 0).map((push) => make("li", { class: "part" }, make("span", { class: "part-name" }, tokenText(lens.texts[push.token])),
    spanBar(0, push.value, -most, most), make("span", { class: "number" }, signed(push.value, 2))));
  const write = `out W_out${lens.model.has_out_bias ? " + b_out" : ""}`;
  const sums = { pre: `x + ${write}`, post: `norm(x + ${write})` };
  return storyStep("The result is written", `x = ${sums[lens.model.norm_position] ?? `x + norm(${write})`}`,
    make("p", {}, "One more matrix turns ", make("i", {}, "out"), ` into ${lens.model.embed_dim} numbers that are added to what `, tokenAt(lens, state.query),
      " holds; the layers behind it read them there. Straight from there to the logits, this write alone moves these next tokens most"
      + (lens.model.pushes_all ? ":" : ` (of the ${lens.model.num_candidates} tokens that stand on this page):`)),
    make("ul", { class: "parts", id: "pushes" }, ...rows));
}

function makeStory(box, lens, choose) {
  return (state, look) => {
    rebuild(box,
      make("p", { class: "lead" }, `Layer ${state.layer}, head ${state.head}: `, tokenAt(lens, state.query), " looks back."),
      make("ol", { class: "steps" }, queryStep(lens, state), meetStep(lens, state, look, choose), softmaxStep(look), dimensionsStep(lens, state, look, choose), originsStep(lens, state, look), valueStep(lens, state, look), writeStep(lens, state)));
  };
}
