// ---- pattern.js: the attention weights of a head as a picture, a cell per query and source.

const LABEL_PIXELS = 12; // between two labels of an axis

/**
 * A picture of T x T weights, a pixel per cell; masked cells are transparent and show the hatched background.
 * `texts` are those of the tokens, shown on both axes. draw(weightOf, place) fills it; onMove(place) is called for clicks and keys.
 */
function makePattern(box, texts, labelOf, onMove) {
  const numTokens = texts.length;
  const canvas = make("canvas", { width: numTokens, height: numTokens, class: "pattern-cells", "aria-hidden": "true" });
  const rowMark = make("span", { class: "mark row-mark" });
  const cellMark = make("span", { class: "mark cell-mark" });
  const plot = make("div", { class: "pattern", tabindex: 0, role: "application", "aria-roledescription": "attention pattern" }, canvas, rowMark, cellMark);
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const labels = { x: make("div", { class: "labels labels-x", "aria-hidden": "true" }), y: make("div", { class: "labels labels-y", "aria-hidden": "true" }) };
  const longest = Math.max(...texts.map((text) => tokenText(text).textContent.length));
  box.append(make("div", { class: longest === 1 ? "pattern-frame upright" : "pattern-frame", style: `--label:${Math.min(longest, 8) * 0.65 + 0.5}em` },
    make("span", { class: "pattern-x muted" }, "token that is seen \u2192"), make("span", { class: "pattern-y muted" }, "token that looks back \u2192"), labels.x, labels.y, plot), readout);
  // Every token has its label if there is room, else every second, third ...; the chosen one always has.
  const label = (axis, chosen) => {
    const step = Math.ceil((LABEL_PIXELS * numTokens) / (plot.clientWidth || LABEL_PIXELS * numTokens));
    const shown = texts.map((_, t) => t).filter((t) => t === chosen || (t % step === 0 && Math.abs(t - chosen) >= step));
    labels[axis].replaceChildren(...shown.map((t) => make("span", { class: t === chosen ? "chosen" : "", "data-at": t, style: `--at:${((t + 0.5) / numTokens) * 100}%` }, tokenText(texts[t]))));
  };
  let place = { query: 0, source: 0 };

  const cellOf = (event) => {
    const rect = canvas.getBoundingClientRect();
    const index = (part) => clamp(Math.floor(part * numTokens), 0, numTokens - 1);
    return { query: index((event.clientY - rect.top) / rect.height), source: index((event.clientX - rect.left) / rect.width) };
  };
  plot.addEventListener("click", (event) => onMove(cellOf(event)));
  plot.addEventListener("pointermove", (event) => {
    const cell = cellOf(event);
    plot.title = labelOf(cell.query, cell.source);
  });
  const moves = {
    ArrowLeft: ({ source }) => ({ source: source - 1 }), ArrowRight: ({ source }) => ({ source: source + 1 }),
    ArrowUp: ({ query }) => ({ query: query - 1 }), ArrowDown: ({ query }) => ({ query: query + 1 }),
    Home: () => ({ source: 0 }), End: ({ query }) => ({ source: query }),
  };
  onKeys(plot, moves, (move) => onMove({ ...place, ...move(place) }));

  new ResizeObserver(() => {
    label("x", place.source);
    label("y", place.query);
  }).observe(plot);

  return (weightOf, now) => {
    place = now;
    const colours = rampColours();
    const image = new ImageData(numTokens, numTokens);
    for (let t = 0; t < numTokens; t++) {
      for (let s = 0; s <= t; s++) {
        const weight = weightOf(t, s);
        if (weight === null) continue;
        const colour = Math.round(clamp(weight, 0, 1) * 255) * 4;
        image.data.set(colours.subarray(colour, colour + 4), (t * numTokens + s) * 4);
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    const cell = 100 / numTokens;
    rowMark.style.cssText = `top:${now.query * cell}%;height:${cell}%`;
    cellMark.style.cssText = `top:${now.query * cell}%;height:${cell}%;left:${now.source * cell}%;width:${cell}%`;
    label("x", now.source);
    label("y", now.query);
    readout.textContent = labelOf(now.query, now.source);
    plot.setAttribute("aria-label", `Attention pattern. ${readout.textContent}`);
  };
}

function makeHeadPattern(lens, choose) {
  let rows = [];
  const weightOf = (t, s) => (s > t ? null : rows[t]?.[s] ?? null);
  const labelOf = (t, s) => {
    const weight = weightOf(t, s);
    const share = weight === null ? (s > t ? "masked, it comes later" : "masked, outside of the window") : percent(weight);
    return `${t} \u201c${spoken(lens.text(t))}\u201d looks at ${s} \u201c${spoken(lens.text(s))}\u201d: ${share}`;
  };
  const draw = makePattern(document.getElementById("pattern"), lens.tokens.map((token) => lens.texts[token]), labelOf, (place) => {
    const query = clamp(place.query, 0, lens.numTokens - 1);
    choose({ query, source: clamp(place.source, 0, query) });
  });
  return (state) => {
    rows = lens.tokens.map((_, t) => lens.weightsRow(state.layer, state.head, t));
    draw(weightOf, state);
  };
}
