// ---- learning.js: the same head at the recorded steps of its training run.

const PLAY_MILLISECONDS = 350;
const LINES = { previous_token: "", first_token: "6 3", induction: "2 3", same_token: "10 3 2 3" };

/** The four scores of a head over the steps, as lines with different dashes and a legend. */
function makeLines(lens, state) {
  const { steps } = lens.history;
  const names = Object.keys(MEANINGS);
  const [width, height, last] = [400, 130, steps.at(-1) - steps[0] || 1];
  const x = (snapshot) => ((steps[snapshot] - steps[0]) / last) * width;
  const y = (score) => (1 - clamp(score, 0, 1)) * height;
  const scoreAt = (snapshot, index) => lens.arrays.history_scores.at(snapshot, index, state.layer, state.head);
  const line = (name, index) => makeSvg("polyline", { class: name === state.score ? "line main" : "line", "stroke-dasharray": LINES[name], points: steps.map((_, m) => `${x(m).toFixed(1)},${y(scoreAt(m, index)).toFixed(1)}`).join(" ") });
  const grid = [0, 0.5, 1].map((score) => makeSvg("g", {}, makeSvg("path", { class: "axis", d: `M0,${y(score)}h${width}` }), makeSvg("text", { x: -6, y: y(score) + 4, "text-anchor": "end" }, `${score}`)));
  const now = makeSvg("path", { class: "now", d: `M${x(state.snapshot).toFixed(1)},0v${height}` });
  const legend = make("ul", { class: "legend" }, ...names.map((name, index) => make("li", { class: name === state.score ? "main" : "" },
    makeSvg("svg", { viewBox: "0 0 28 6", class: "key", "aria-hidden": "true" }, makeSvg("path", { class: "line", d: "M0,3h28", "stroke-dasharray": LINES[name] })),
    ` ${MEANINGS[name][0]} `, make("b", { class: "figure" }, fixed(scoreAt(state.snapshot, index), 2)))));
  const text = `Scores of layer ${state.layer}, head ${state.head} from step ${steps[0]} to ${steps.at(-1)}`;
  return [makeSvg("svg", { class: "lines", viewBox: `-26 -8 ${width + 34} ${height + 30}`, role: "img", "aria-label": text }, ...grid, ...names.map(line), now,
    makeSvg("text", { x: 0, y: height + 18 }, `step ${steps[0]}`), makeSvg("text", { x: width, y: height + 18, "text-anchor": "end" }, `step ${steps.at(-1)}`)), legend];
}

function makeLearning(lens, choose) {
  if (!lens.history) return () => {};
  document.getElementById("learning-section").hidden = false;
  const { steps, tokens } = lens.history;
  const box = document.getElementById("learning");
  const slider = make("input", { type: "range", id: "snapshot", min: 0, max: steps.length - 1, step: 1, oninput: (event) => choose({ snapshot: Number(event.target.value) }) });
  const step = make("output", { for: "snapshot", id: "snapshot-step" });
  const play = make("button", { type: "button", id: "play" }, "Play");
  const pattern = make("div");
  const heads = make("div", { class: "scroll" });
  const lines = make("div");
  const text = tokens.map((token) => lens.texts[token]);
  box.append(make("p", {}, "While it trained, the run recorded the attention to one fixed text: ", make("q", { class: "recorded" }, ...text.map(tokenText)), ". It is not the prompt above, which came only afterwards: a run records the first words of its validation text, or the text of ", make("code", { class: "setting" }, "--lens.prompt"), ". Move through the steps, and see heads form."),
    make("div", { class: "slider" }, play, make("label", { for: "snapshot" }, "Step"), slider, step),
    make("div", { class: "side-by-side" }, pattern, make("div", {}, lines, heads)));

  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    play.textContent = "Pause";
    choose((state) => (state.snapshot === steps.length - 1 ? { snapshot: 0 } : {}));
    timer = setInterval(() => choose((state) => {
      if (state.snapshot >= steps.length - 2) stop();
      return { snapshot: Math.min(state.snapshot + 1, steps.length - 1) };
    }), PLAY_MILLISECONDS);
  });

  let now = { layer: 0, head: 0, snapshot: 0 };
  let place = { query: text.length - 1, source: Math.max(text.length - 2, 0) };
  const windowOf = (layer) => lens.model.windows[layer] ?? Infinity;
  const weightOf = (t, s) => (s > t || t - s >= windowOf(now.layer) ? null : lens.arrays.history_weights.at(now.snapshot, now.layer, now.head, triangle(t) + s));
  const labelOf = (t, s) => {
    const weight = weightOf(t, s);
    return `step ${steps[now.snapshot]}: ${t} \u201c${spoken(text[t])}\u201d looks at ${s} \u201c${spoken(text[s])}\u201d: ${weight === null ? "masked" : percent(weight)}`;
  };
  const drawPattern = makePattern(pattern, text, labelOf, (moved) => {
    const query = clamp(moved.query, 0, text.length - 1);
    place = { query, source: clamp(moved.source, 0, query) };
    drawPattern(weightOf, place);
  });
  const drawHeads = makeHeadGrid(heads, lens, choose, "All heads at this step; pick one");
  return (state) => {
    now = state;
    slider.value = state.snapshot;
    slider.setAttribute("aria-valuetext", `step ${steps[state.snapshot]}`);
    step.textContent = `${steps[state.snapshot]}`;
    drawPattern(weightOf, place);
    lines.replaceChildren(make("p", { class: "muted" }, `Layer ${state.layer}, head ${state.head} over the run:`), ...makeLines(lens, state), make("p", { class: "muted" }, `All heads at step ${steps[state.snapshot]}, ${MEANINGS[state.score][0]}:`));
    const index = Object.keys(MEANINGS).indexOf(state.score);
    drawHeads(state, (layer, head) => lens.arrays.history_scores.at(state.snapshot, index, layer, head));
  };
}
