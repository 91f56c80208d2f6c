// ---- lens.js: the activations, by layer, head and position.

/** Where the row of query t starts, in a lower triangle. */
function triangle(t) {
  return (t * (t + 1)) / 2;
}

// What a score comes from, by what query and key are made of; in the order of the page.
const ORIGIN_GROUPS = {
  token: "the two tokens themselves",
  position: "the two positions themselves",
  mixed: "token with position",
  rotation: "the turn by their distance",
  earlier: "what earlier layers wrote",
  bias: "biases",
};

function originGroup(ofQuery, ofKey) {
  const both = [ofQuery, ofKey];
  if (both.includes("bias")) return "bias";
  if (both.includes("heads") || both.includes("feed_forward")) return "earlier";
  return ofQuery === ofKey ? ofQuery : "mixed";
}

class Lens {
  constructor(data, arrays) {
    this.model = data.model;
    this.tokens = data.tokens;
    this.texts = data.texts;
    this.history = data.history;
    this.arrays = arrays;
    this.numTokens = data.tokens.length;
  }

  /** The text of a token of the prompt. */
  text(t) {
    return this.texts[this.tokens[t]];
  }

  /** The first source in the window of query t. */
  firstSeen(layer, t) {
    const window = this.model.windows[layer];
    return window === null ? 0 : Math.max(0, t - window + 1);
  }

  keyHead(head) {
    return Math.floor(head / (this.model.num_heads / this.model.num_kv_heads));
  }

  query(layer, head, t) {
    return this.arrays.q.row(layer, head, t);
  }

  key(layer, head, s) {
    return this.arrays.k.row(layer, this.keyHead(head), s);
  }

  value(layer, head, s) {
    return this.arrays.v.row(layer, this.keyHead(head), s);
  }

  /** The sources that a query of a head sees, with their scores and softmax. */
  look(layer, head, t) {
    const first = this.firstSeen(layer, t);
    const sources = Array.from({ length: t - first + 1 }, (_, i) => first + i);
    const scores = sources.map((s) => this.arrays.scores.at(layer, head, triangle(t) + s));
    return { first, sources, scores, ...softmax(scores) };
  }

  /** The parts of a score: q · k times the scale, the soft cap, and the position bias. */
  scoreParts(layer, head, t, s, score) {
    const { scale, soft_cap: cap, slopes } = this.model;
    const q = this.query(layer, head, t);
    const k = this.key(layer, head, s);
    const bias = slopes === null ? 0 : -slopes[head] * (t - s);
    const products = Array.from(q, (number, h) => number * k[h] * scale);
    // Without a cap q . k follows from the score, which has more digits than the vectors.
    const match = cap === null ? score - bias : products.reduce((a, b) => a + b, 0);
    return { q, k, products, match, capped: score - bias, bias };
  }

  /**
   * A score by the origins of query and key: rows[i][j] is what origin i of the query and origin j of the key gave, and
   * groups sums them; null for a source whose pairs the page does not keep.
   */
  scoreOrigins(layer, head, t, s, parts) {
    const { origins, positions } = this.model;
    const count = origins.length;
    const place = this.arrays.pair_sources.row(layer, head, t).indexOf(s);
    if (place < 0) return null;
    const pairs = this.arrays.pairs.row(layer, head, t, place);
    const rows = origins.map((_, i) => Array.from(pairs.subarray(i * count, (i + 1) * count)));
    const sums = {};
    rows.forEach((row, i) => row.forEach((value, j) => {
      const name = originGroup(origins[i], origins[j]);
      sums[name] = (sums[name] ?? 0) + value;
    }));
    // The turn of rotary positions is what the product has beyond these pairs.
    if (positions === "rotary") sums.rotation = parts.match - pairs.reduce((a, b) => a + b, 0);
    const groups = Object.keys(ORIGIN_GROUPS).filter((name) => name in sums && (layer > 0 || name !== "earlier")).map((name) => ({ name, value: sums[name] }));
    return { rows, groups };
  }

  /** The weighted sum of the values. */
  headOutput(layer, head, look) {
    const output = new Float64Array(this.model.head_dim);
    look.sources.forEach((s, i) => {
      this.value(layer, head, s).forEach((number, h) => (output[h] += look.weights[i] * number));
    });
    return output;
  }

  /** The attention weight of each source at query t; null if masked. */
  weightsRow(layer, head, t) {
    const look = this.look(layer, head, t);
    return Array.from({ length: this.numTokens }, (_, s) => (s < look.first || s > t ? null : look.weights[s - look.first]));
  }

  /** The two tokens whose logits are split: the likeliest, and one to compare it with. */
  targets(t) {
    return [this.arrays.targets.at(0, t), this.arrays.targets.at(1, t)];
  }

  /** The number of the first or second target, or their difference. */
  ofTarget(which, numberOf) {
    return which === "difference" ? numberOf(0) - numberOf(1) : numberOf(which === "first" ? 0 : 1);
  }

  /** The contributions to a logit at position t: label, value, and for heads layer and head. */
  logitParts(which, t) {
    const { num_layers: L, num_heads: N } = this.model;
    const arrays = this.arrays;
    const part = (label, numberOf, more = {}) => ({ label, value: this.ofTarget(which, numberOf), ...more });
    const parts = [part("the token itself (its embedding)", (j) => arrays.part_token.at(j, t))];
    if (this.model.has_position_vectors) {
      parts.push(part("its position (a vector for it)", (j) => arrays.part_position.at(j, t)));
    }
    for (let layer = 0; layer < L; layer++) {
      for (let head = 0; head < N; head++) {
        parts.push(part(`layer ${layer}, head ${head}`, (j) => arrays.part_heads.at(j, layer, head, t), { layer, head }));
      }
      parts.push(part(`layer ${layer}, feed-forward`, (j) => arrays.part_feed_forward.at(j, layer, t)));
    }
    if (this.model.has_biases) parts.push(part("biases", (j) => arrays.part_bias.at(j, t)));
    if (this.model.logit_soft_cap !== null) parts.push(part("the soft cap of logits", (j) => arrays.part_soft_cap.at(j, t)));
    return parts;
  }

  /** The contribution of a head to a logit at position t, by source. */
  sourceParts(which, layer, head, t) {
    const first = this.firstSeen(layer, t);
    return Array.from({ length: t - first + 1 }, (_, i) => ({
      source: first + i,
      value: this.ofTarget(which, (j) => this.arrays.part_sources.at(j, layer, head, triangle(t) + first + i)),
    }));
  }

  logit(which, t) {
    return this.ofTarget(which, (j) => this.arrays.part_logit.at(j, t));
  }
}
