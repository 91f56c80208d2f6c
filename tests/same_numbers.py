"""What a change of structure must leave as it is, to the last bit: run this before it and after it.

    python tests/same_numbers.py write before.npz
    python tests/same_numbers.py compare before.npz

For some 40 models (positions, grouped heads, windows, norms, kernels, scan, remat, dropout, devices) it computes
logits, gradients, all intermediates, edited logits, cached decoding and three training steps. `compare` names what is
not bit-identical and by how much it differs, and exits with 1 where that is more than 1e-6 of the largest number.
`same_numbers.json` beside this file has one hash per model, by kind of processor and version of JAX; `compare` looks
there where no file is given, and `write` adds to it.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from xla_flags import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "flax_decoder_tests"))

import jax
import jax.numpy as jnp
import numpy as np

import flax_decoder as fd
from flax_decoder.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from flax_decoder.parallel.mesh import mesh_of, sharding_of, use_mesh
from flax_decoder.training.hardware import describe_cpu

HASHES = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-6
VOCAB_SIZE, B, T = 29, 2, 13
TINY = {"vocab_size": VOCAB_SIZE, "context_length": 19, "num_layers": 3, "embed_dim": 24, "num_heads": 6, "mlp_dim": 37}
LONG = {**TINY, "context_length": 149, "num_layers": 2}
# What the devices of a mesh divide.
EVEN = {"vocab_size": 30, "mlp_dim": 38, "num_kv_heads": 2}
RING = {**EVEN, "context_length": 148, "window": 37, "window_pattern": [True, False]}

CASES: dict[str, dict] = {
    "default": {},
    "deep heads": {"head_dim": 10, "num_kv_heads": 2},
    **{f"{positions}": {"positions": positions} for positions in ("sinusoidal", "rotary", "alibi", "none")},
    **{
        f"{positions}, grouped, window": {"positions": positions, "num_kv_heads": 2, "window": 5}
        for positions in ("learned", "rotary", "alibi")
    },
    "multi-query, every other window": {
        **{"positions": "rotary", "num_kv_heads": 1, "window": 4, "window_pattern": [True, False]},
        **{"rotary_window_base": 100.0, "rotary_scaling": "linear"},
    },
    "llama3 rotation of a part": {
        **{"positions": "rotary", "rotary_scaling": "llama3", "rotary_original_context": 8, "head_dim": 8},
        **{"rotary_fraction": 0.5},
    },
    **{f"norm {position}": {"norm_position": position, "norm": "rmsnorm"} for position in ("post", "both", "output")},
    "parallel, biases": {
        **{"parallel_residual": True, "norm_bias": True, "attention_in_bias": True, "attention_out_bias": True},
        **{"mlp_bias": True, "tied_head": False},
    },
    "qk_norm head": {"qk_norm": "head", "positions": "rotary"},
    "qk_norm all": {"qk_norm": "all", "num_kv_heads": 3},
    "soft caps, scale": {"attention_soft_cap": 3.0, "logit_soft_cap": 5.0, "attention_scale": 0.3, "embed_scale": 4.0},
    "swiglu": {"feed_forward": "swiglu"},
    "geglu_tanh": {"feed_forward": "geglu_tanh", "output_init": "zero"},
    "relu_squared": {"feed_forward": "relu_squared"},
    "dropout": {"dropout": 0.2},
    "dropout, scan, alibi": {"dropout": 0.2, "scan_layers": True, "positions": "alibi"},
    "scan, windows": {"scan_layers": True, "window": 5, "window_pattern": [True, False], "positions": "rotary"},
    **{f"remat {remat}": {"remat": remat, "dropout": 0.1} for remat in ("attention", "dots", "full")},
    "remat attention, scan": {"remat": "attention", "scan_layers": True},
    "bfloat16": {"dtype": "bfloat16", "positions": "rotary"},
    "reference": {"attention": "reference", "num_kv_heads": 2},
    "reference, alibi, long": {**LONG, "attention": "reference", "positions": "alibi"},
    "blockwise": {**LONG, "attention": "blockwise", "num_kv_heads": 3},
    "blockwise, window, alibi": {**LONG, "attention": "blockwise", "window": 70, "positions": "alibi"},
    "blockwise, remat, soft cap": {**LONG, "remat": "attention", "attention_soft_cap": 2.0, "positions": "rotary"},
    "splash": {**LONG, "attention": "splash", "num_layers": 1, "window": 50, "attention_soft_cap": 2.0},
    "ring 4": {**LONG, **RING, "positions": "rotary", "mesh": (2, 1, 4, 1)},
    "ring 2, alibi, dropout": {
        **{**LONG, **RING, "positions": "alibi", "dropout": 0.2, "mesh": (1, 2, 2, 2)},
        **{"attention_soft_cap": 2.0},
    },
    "tensor 2": {**EVEN, "mesh": (2, 2, 1, 2)},
}


def numbers_of(settings: dict) -> dict[str, np.ndarray]:
    """All arrays of one model, by what they are."""
    settings = {**TINY, **settings}
    mesh = mesh_of(jax.devices()[: np.prod(shape)], *shape) if (shape := settings.pop("mesh", None)) else None
    # As a file would give them.
    settings["window_pattern"] = tuple(settings.get("window_pattern", (True,)))
    config = ModelConfig(**settings)
    length = config.context_length if config.context_length > 100 else T
    model = fd.Decoder(config)
    run = Config(model=config, optimizer=OptimizerConfig(name="adamw"), training=TrainingConfig(num_steps=3))
    rng = np.random.default_rng(7)
    tokens = jnp.asarray(rng.integers(0, VOCAB_SIZE, (4 if mesh else B, length + 1)), jnp.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    found = {}

    def keep(name: str, tree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf.astype(jnp.float32))

    state = fd.init_state(model, run, rng=jax.random.key(0), mesh=mesh)
    # At the start all norms are ones and all biases zeros, and parameters are small.
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params)))
    keys = jax.tree.unflatten(jax.tree.structure(state.params), keys)
    state = state.replace(
        params=jax.tree.map(lambda p, key: p + 0.1 * jax.random.normal(key, p.shape), state.params, keys)
    )
    params = state.params

    def loss(params, batch):
        logits = model.apply(
            {"params": params}, batch["inputs"], deterministic=config.dropout == 0, rngs={"dropout": jax.random.key(3)}
        )
        return jnp.square(logits).mean(), logits

    def of_call(params, batch):
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return {"logits": logits, "gradients": gradients}

    if mesh is not None:
        with use_mesh(mesh):
            batch = jax.device_put(batch, sharding_of(mesh, "batch", "length"))
            keep("", jax.jit(of_call)(params, batch))
    else:
        keep("", jax.jit(of_call)(params, batch))

        def inside(params, tokens, factor):
            edits = {
                "q": lambda x, layer: jnp.where(layer == 1, x * 2, x),
                "scores": lambda x, layer: x * jnp.where(layer == 1, factor, 1),
                "weights": lambda x, layer: x.at[:, 1].multiply(jnp.where(layer == 0, factor, 1)),
                "hidden": lambda x, layer: jnp.where(layer == 0, x + 1, x),
            }
            logits, seen = model.apply({"params": params}, tokens, mutable=["intermediates"])
            return {
                "logits inside": logits,
                "seen": seen,
                "edited": model.apply({"params": params}, tokens, edits=edits),
            }

        keep("", jax.jit(inside)(params, batch["inputs"], 0.5))

        def cached(params, tokens):
            cache = fd.empty_cache(config, B, 11, 2)
            variables = {"params": fd.unstack_layers(params)}
            first, cache = model.apply(variables, tokens[:, :5], cache, num_tokens_B=jnp.array([5, 3]), last_only=True)
            second, cache = model.apply(variables, tokens[:, 5:8], cache)
            outputs = [first, second]
            for t in range(8, 13):
                logits, cache = model.apply({"params": params}, tokens[:, t : t + 1], cache)
                outputs.append(logits)
            return {"decoded": outputs, "cache": cache.layers}

        keep("", jax.jit(cached)(params, batch["inputs"]))

    step = jax.jit(fd.train_step)
    for _ in range(3):
        if mesh is None:
            state, metrics = step(state, batch)
        else:
            with use_mesh(mesh):
                state, metrics = step(state, batch)
    keep("trained", {"params": state.params, "loss": metrics["loss"]})
    return found


def hash_of(arrays: dict[str, np.ndarray]) -> str:
    """Of all names and bits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()[:16]


def main(action: str, file: str | None = None, only: str = "") -> int:
    """Writes or compares; `only` is a part of the names of the cases that are wanted."""
    kind = f"jax {jax.__version__}, {describe_cpu()}"
    known = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    before = dict(np.load(file)) if file and action == "compare" else None
    kept, hashes, worst = {}, {}, 0.0
    for case, settings in CASES.items():
        if only not in case:
            continue
        found = numbers_of(settings)
        hashes[case] = hash_of(found)
        kept |= {f"{case}: {name}": array for name, array in found.items()}
        if before is not None:
            old = {name: array for name, array in before.items() if name.startswith(f"{case}: ")}
            new = {f"{case}: {name}": array for name, array in found.items()}
            for name in sorted(old.keys() ^ new.keys()):
                print(f"only {'before' if name in old else 'now'}: {name}")
                worst = np.inf
            differing = {
                name: difference(old[name], new[name])
                for name in old.keys() & new.keys()
                if old[name].tobytes() != new[name].tobytes()
            }
            worst = max([worst, *differing.values()])
            name = max(differing, key=differing.get, default="")
            print(
                f"{case}: {len(differing)} of {len(new)} arrays differ, by {differing.get(name, 0):.1e} at most {name}"
            )
        elif action == "compare":
            same = known.get(kind, {}).get(case) == hashes[case]
            worst = max(worst, 0.0 if same else np.inf)
            print(f"{case}: {'the same bits' if same else 'OTHER BITS, or none known'}")
        else:
            print(f"{case}: {len(found)} arrays, {hashes[case]}")
        jax.clear_caches()
    if action == "write":
        if file:
            np.savez(file, **kept)
        HASHES.write_text(json.dumps(known | {kind: known.get(kind, {}) | hashes}, indent=1) + "\n")
    return int(worst > TOLERANCE)


def difference(old: np.ndarray, new: np.ndarray) -> float:
    """The largest, as a part of the largest number."""
    if old.shape != new.shape or (np.isfinite(old) != np.isfinite(new)).any():
        return float("inf")
    finite = np.isfinite(old)
    return float(np.abs(old[finite] - new[finite]).max(initial=0) / max(np.abs(old[finite]).max(initial=0), 1e-30))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
