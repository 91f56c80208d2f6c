// ---- prompt.js: the steppers, the prompt as tokens, and the three answers.

// From this share on, the background is so dark (on a dark page: bright) that text on it changes its colour.
const STRONG = 0.62;

/** Steppers for token, layer and head. */
function makeChooser(box, lens, choose) {
  const { num_layers: L, num_heads: N } = lens.model;
  const stepper = (name, label, count) => {
    const output = make("output", { id: `${name}-now` });
    const step = (by) => choose((state) => ({ [name]: clamp(state[name] + by, 0, count - 1) }));
    const button = (text, by, which) => make("button", { type: "button", "aria-label": `${which} ${label.toLowerCase()}`, onclick: () => step(by) }, text);
    box.append(make("div", { class: "stepper", role: "group", "aria-label": label },
      make("span", { class: "name" }, label), button("\u2039", -1, "previous"), output, button("\u203a", 1, "next")));
    return output;
  };
  const outputs = { query: stepper("query", "Token", lens.numTokens), layer: stepper("layer", "Layer", L), head: stepper("head", "Head", N) };
  return (state) => {
    outputs.query.replaceChildren(`${state.query} `, tokenText(lens.text(state.query)));
    outputs.layer.textContent = state.layer;
    outputs.head.textContent = state.head;
  };
}

function makePrompt(box, lens, choose) {
  const chips = lens.tokens.map((_, t) => {
    const share = make("span", { class: "share", "aria-hidden": "true" });
    const chip = make("div", { class: "chip", role: "option", "data-token": t, onclick: () => choose({ query: t }) }, tokenText(lens.text(t)), share);
    if (lens.text(t).endsWith("\n")) chip.classList.add("ends-line");
    return { chip, share };
  });
  chips.forEach(({ chip }, t) => {
    box.append(chip);
    if (lens.text(t).endsWith("\n")) box.append(make("span", { class: "line-break", "aria-hidden": "true" }));
  });
  const moves = { ArrowLeft: (t) => t - 1, ArrowRight: (t) => t + 1, Home: () => 0, End: () => lens.numTokens - 1 };
  onKeys(box, moves, (move) => {
    choose((state) => ({ query: clamp(move(state.query), 0, lens.numTokens - 1) }));
    box.querySelector('[aria-selected="true"]').focus({ preventScroll: false });
  });
  return (state) => {
    const weights = lens.weightsRow(state.layer, state.head, state.query);
    chips.forEach(({ chip, share }, t) => {
      const isQuery = t === state.query;
      const weight = weights[t];
      chip.setAttribute("aria-selected", isQuery);
      chip.tabIndex = isQuery ? 0 : -1;
      chip.classList.toggle("unread", weight === null);
      chip.classList.toggle("strong", weight > STRONG);
      chip.style.setProperty("--share", weight ?? 0);
      share.textContent = weight === null ? "\u00a0" : weight < 0.005 ? "\u00b7" : `${Math.round(weight * 100)}`;
      const read = weight === null ? "not seen" : `${percent(weight)} of the attention`;
      chip.setAttribute("aria-label", `${t}: ${spoken(lens.text(t))}, ${read}`);
      chip.title = `position ${t}, token ${lens.tokens[t]}: ${read}`;
    });
  };
}

/** A token with its position. */
function tokenAt(lens, t) {
  return make("span", { class: "at" }, tokenText(lens.text(t)), make("sub", {}, `${t}`));
}

function joined(items) {
  return items.flatMap((item, i) => (i === 0 ? [item] : [i === items.length - 1 ? " and " : ", ", item])).flat();
}

function answerRead(lens, state, look) {
  const order = ranked(look.weights);
  const share = (i) => make("b", { class: "figure" }, percent(look.weights[order[i]]));
  const best = look.sources[order[0]];
  const sentence = [`Layer ${state.layer}, head ${state.head} at `, tokenAt(lens, state.query)];
  if (order.length === 1) return [...sentence, " sees only itself, so all of its attention, ", share(0), ", stays there."];
  sentence.push(" read ", tokenAt(lens, best), best === state.query ? " (itself)" : "", " most: ", share(0), " of its attention. Then comes ",
    tokenAt(lens, look.sources[order[1]]), " with ", share(1));
  const rest = order.slice(2).reduce((sum, i) => sum + look.weights[i], 0);
  if (order.length > 2) sentence.push(`; the other ${order.length - 2} tokens that it sees share ${percent(rest)}`);
  return [...sentence, "."];
}

function answerWhy(lens, state, look) {
  const order = ranked(look.weights);
  const best = look.sources[order[0]];
  const parts = lens.scoreParts(state.layer, state.head, state.query, best, look.scores[order[0]]);
  const dims = ranked(parts.products).slice(0, 3).filter((h) => parts.products[h] > 0);
  const naming = (numbers) => (h) => [`${h} (`, make("b", { class: "figure" }, signed(numbers[h], 2)), ")"];
  const named = dims.map(naming(parts.products));
  const score = look.scores[order[0]];
  const sentence = ["Its key meets the query with a score of ", make("b", { class: "figure" }, fixed(score, 2))];
  if (order.length > 1) {
    const lead = look.scores[order[0]] - look.scores[order[1]];
    sentence.push(", ", make("b", { class: "figure" }, fixed(lead, 2)), " ahead of the second: e", make("sup", {}, fixed(lead, 2)), ` = ${fixed(Math.exp(lead), 2)} times its attention`);
  }
  sentence.push(score < 0 && order.length > 1 ? ". No score is above 0 here, and only the differences count. " : ". ");
  const origins = lens.scoreOrigins(state.layer, state.head, state.query, best, parts);
  if (origins !== null && origins.groups.length > 1) {
    const shares = origins.groups.map(({ name, value }) => [`${ORIGIN_GROUPS[name]} `, make("b", { class: "figure" }, signed(value, 2))]);
    sentence.push("It is made of ", ...joined(shares), ". ");
  }
  if (named.length > 0) {
    sentence.push(`Of the ${parts.products.length} dimensions in which the two are multiplied, `, ...joined(named),
      ` ${named.length > 1 ? "add" : "adds"} the most`);
    const rest = parts.match - dims.reduce((sum, h) => sum + parts.products[h], 0);
    sentence.push(score < 0 ? `, but all others together take it down by ${fixed(-rest, 2)}` : `; all others together ${signed(rest, 2)}`);
  }
  if (order.length > 1) {
    const second = lens.scoreParts(state.layer, state.head, state.query, look.sources[order[1]], look.scores[order[1]]);
    const leads = parts.products.map((product, h) => product - second.products[h]);
    const ahead = ranked(leads).slice(0, 2).filter((h) => leads[h] > 0);
    if (ahead.length > 0) sentence.push("; ahead of the second it is most in ", ...joined(ahead.map(naming(leads))));
  }
  if (lens.model.slopes !== null) sentence.push(`; the distance takes ${fixed(-parts.bias, 2)} off`);
  return [...sentence, "."];
}

function answerWritten(lens, state, look) {
  const pushed = pushesOf(lens, state);
  const part = (push) => [tokenWord(lens.texts[push.token]), " (", make("b", { class: "figure" }, signed(push.value, 2)), ")"];
  const up = pushed.filter((push) => push.value > 0).slice(0, 3);
  const down = pushed.filter((push) => push.value < 0).slice(-2).reverse();
  const sentence = ["The values, mixed in these shares, were added to what ", tokenAt(lens, state.query), " holds. By itself that "];
  const effects = [];
  if (up.length > 0) effects.push(["raises the logits of ", ...joined(up.map(part))]);
  if (down.length > 0) effects.push(["lowers ", ...joined(down.map(part))]);
  sentence.push(...joined(effects), effects.length > 0 ? ". " : "changes no logit. ");
  const target = lens.targets(state.query)[0];
  const given = lens.arrays.part_heads.at(0, state.layer, state.head, state.query);
  sentence.push("The model\u2019s own guess, ", tokenWord(lens.texts[target]), ", has the logit ", make("b", { class: "figure" }, fixed(lens.logit("first", state.query), 2)),
    "; this head gave ", make("b", { class: "figure" }, signed(given, 2)), " of it.");
  return sentence;
}

/** The tokens whose logits the head's write changes most, from the most raised to the most lowered. */
function pushesOf(lens, state) {
  const at = [state.layer, state.head, state.query];
  const values = lens.arrays.push_values.row(...at);
  return Array.from(lens.arrays.push_tokens.row(...at), (token, i) => ({ token, value: values[i] }));
}

function makeAnswers(box, lens) {
  return (state, look) => {
    const answer = (question, sentence) => make("div", {}, make("h3", {}, question), make("p", {}, ...sentence));
    rebuild(box,
      answer("Which token did this head read?", answerRead(lens, state, look)),
      answer("Why that one?", answerWhy(lens, state, look)),
      answer("What did it write?", answerWritten(lens, state, look)));
  };
}
