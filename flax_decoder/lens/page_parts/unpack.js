// ---- unpack.js: unpacks the arrays; the inverse of lens/packing.py.

/** An array of numbers with a shape; `row(...)` is a sub-array by its first indices, `at(...)` one number. */
class NumberArray {
  constructor(shape, values) {
    this.shape = shape;
    this.values = values;
    this.strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  }

  start(indices) {
    return indices.reduce((sum, index, axis) => sum + index * this.strides[axis], 0);
  }

  at(...indices) {
    return this.values[this.start(indices)];
  }

  row(...indices) {
    const start = this.start(indices);
    return this.values.subarray(start, start + this.strides[indices.length - 1]);
  }
}

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Bytes by significance -> integers with the sign in the lowest bit -> decimals. */
async function unpackArray(packed) {
  const bytes = await inflate(packed.data);
  const size = packed.shape.reduce((a, b) => a * b, 1);
  const unit = 10 ** packed.decimals;
  const values = new Float64Array(size);
  for (let i = 0; i < size; i++) {
    let whole = 0;
    for (let plane = packed.planes - 1; plane >= 0; plane--) whole = whole * 256 + bytes[plane * size + i];
    values[i] = (whole % 2 === 1 ? -(whole + 1) / 2 : whole / 2) / unit;
  }
  return new NumberArray(packed.shape, values);
}

async function unpackAll(packed) {
  const names = Object.keys(packed);
  const arrays = await Promise.all(names.map((name) => unpackArray(packed[name])));
  return Object.fromEntries(names.map((name, i) => [name, arrays[i]]));
}
