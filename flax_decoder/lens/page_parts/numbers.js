// ---- numbers.js: numbers as text, and arithmetic.

const MINUS = "\u2212";

/** "−1.25": with a real minus sign, and without the sign of a zero. */
function fixed(number, digits) {
  const text = number.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", MINUS);
}

/** "+1.25" or "−1.25": signs do not depend on colour. */
function signed(number, digits) {
  const text = fixed(number, digits);
  return text.startsWith(MINUS) || Number(text) === 0 ? text : "+" + text;
}

/** A share of 1 as "34.1 %". */
function percent(share) {
  return fixed(share * 100, 1) + "\u00a0%";
}

/** The steps of a softmax over scores: its maximum, the exponentials, their sum, the weights. */
function softmax(scores) {
  const max = Math.max(...scores);
  const exps = scores.map((score) => Math.exp(score - max));
  const sum = exps.reduce((a, b) => a + b, 0);
  return { max, exps, sum, weights: exps.map((exp) => exp / sum) };
}

/** The indices of the numbers, largest first. */
function ranked(numbers, sizeOf = (number) => number) {
  return [...numbers.keys()].sort((a, b) => sizeOf(numbers[b]) - sizeOf(numbers[a]) || a - b);
}

function clamp(number, low, high) {
  return Math.min(Math.max(number, low), high);
}
