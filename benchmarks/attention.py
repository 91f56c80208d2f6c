"""Memory and time of each implementation of attention: one attention layer, forward and backward, in bfloat16.

    pip install -e . && python benchmarks/attention.py
    pip install -e ".[tpu]" && python benchmarks/attention.py --topology v5p:2x2x1
    pip install -e ".[cuda13]" && python benchmarks/attention.py --topology h100:1

On local devices it also times each, and prints its largest difference from the first, in outputs and gradients, over
the largest value. For another topology the compiler gives the memory and the program.
"""

import argparse
import re
import time
from typing import Any

from flax_decoder.planning.topology import LOCAL, devices_of, prepare

NAMES = ("reference", "blockwise", "cudnn", "splash")
NUM_TIMED = 10


def main() -> None:
    """Prints a table with a row per implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default=LOCAL)
    for name, default in {"batch": 1, "length": 2048, "heads": 32, "kv-heads": 8, "head-dim": 128, "window": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    asked = parser.parse_args()
    prepare(asked.topology)
    print("| `attention` | temporaries | arrays of T x T | kernels | time | difference |\n|---|---|---|---|---|---|")
    expected = None
    for name in asked.only:
        row, expected = measure(name, asked, expected)
        print(f"| `{name}` | {row} |", flush=True)


def measure(name: str, asked: argparse.Namespace, expected: Any) -> tuple[str, Any]:
    """One row of the table, and the outputs of the first implementation."""
    # After `prepare`, which sets environment variables that JAX reads when it is imported.
    import jax
    import jax.numpy as jnp

    from flax_decoder.config import ModelConfig
    from flax_decoder.errors import UserError
    from flax_decoder.nn.attention import SelfAttention
    from flax_decoder.nn.call import Call
    from flax_decoder.parallel.mesh import mesh_of, sharding_of, use_mesh

    width, T = asked.heads * asked.head_dim, asked.length
    config = ModelConfig(
        num_layers=1,
        embed_dim=width,
        num_heads=asked.heads,
        num_kv_heads=asked.kv_heads,
        head_dim=asked.head_dim,
        positions="rotary",
        dtype="bfloat16",
        window=asked.window or None,
        attention=name,
    )
    layer = SelfAttention(config)
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None]

    def init(rng: jax.Array) -> Any:
        return layer.init(rng, jnp.zeros((1, 1, width), config.dtype), Call(positions_BT[:, :1]))

    def loss(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BTD, _ = layer.apply(params, x_BTD, Call(positions_BT, in_order=True), config.window)
        return jnp.square(y_BTD.astype(jnp.float32)).mean(), y_BTD

    mesh = mesh_of(devices_of(asked.topology)[:1])
    x_BTD = jax.ShapeDtypeStruct((asked.batch, T, width), config.dtype, sharding=sharding_of(mesh))
    params = jax.tree.map(lambda leaf: leaf.update(sharding=sharding_of(mesh)), jax.eval_shape(init, jax.random.key(0)))
    try:
        with use_mesh(mesh):
            program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(params, x_BTD).compile()
    except UserError as error:
        return str(error), expected
    text = program.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"') + text.count('custom_call_target="__cudnn$fmha')
    scores = len(re.findall(rf"(?:f32|bf16)\[[\d,]*\b{T},{T}\]", text))
    size = program.memory_analysis().temp_size_in_bytes / 2**20
    row = f"{size:,.0f} MiB | {scores} | {kernels}"
    if asked.topology != LOCAL:
        return f"{row} | |", expected

    params = jax.jit(init)(jax.random.key(0))
    numbers_BTD = jax.random.normal(jax.random.key(1), x_BTD.shape, config.dtype)
    found = jax.block_until_ready(program(params, numbers_BTD))
    start = time.perf_counter()
    for _ in range(NUM_TIMED):
        jax.block_until_ready(program(params, numbers_BTD))
    took = (time.perf_counter() - start) / NUM_TIMED
    expected = found if expected is None else expected

    def difference(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    worst = max(jax.tree.leaves(jax.tree.map(difference, found, expected)))
    return f"{row} | {took * 1e3:.1f} ms | {worst:.1e}", expected


if __name__ == "__main__":
    main()
