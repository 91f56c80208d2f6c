"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen matrix W and beside it two thin ones, A and B, which learn.

    y = x W + scale (x A) B        (`Linear`; scale is alpha / rank)

W keeps its place in the parameters; "lora_a" and "lora_b" stand beside it. A maps the input to `rank` numbers, B maps
these to the output: for query, of shape (D, N, H), A is (D, rank) and B is (rank, N, H). Adapters are a tree of their
own with the same branches: an optimizer, a gradient or a checkpoint of them never sees W.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from flax_decoder.config import LoraConfig
from flax_decoder.errors import UserError
from flax_decoder.nn.axes import PROJECTIONS
from flax_decoder.nn.precision import accumulation_dtype, widened


def init_adapters(lora: LoraConfig, base: Any, rng: jax.Array) -> Any:
    """New adapters, which add nothing yet: A is random and B is zero.

    As in PEFT, A is uniform between plus and minus 1 / sqrt(its number of inputs).

    Args:
        lora: rank and targets.
        base: the parameters of a `Decoder`, with stacked layers; or their shapes.
        rng: random key.

    Returns:
        A tree like the branches of `base` that have adapters.

    Raises:
        UserError: the model lacks a matrix that `lora.targets` names.
    """
    matrices = {place[-1]: place for place in _places(base)}
    if lacking := [name for name in lora.targets or () if name not in matrices]:
        raise UserError(f"lora.targets: the model has no {lacking[0]}, only {', '.join(matrices)}")
    found = {}
    for number, (name, (part, _)) in enumerate(matrices.items()):
        if name not in (lora.targets or matrices):
            continue
        kernel = base["layers"][part][name]["kernel"]
        a_shape, b_shape = _shapes(name, kernel.shape, lora.rank or 0)
        num_inputs = math.prod(a_shape[1:-1])
        dtype, bound = accumulation_dtype(kernel.dtype), num_inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(rng, number), a_shape, dtype, -bound, bound)
        found[part, name] = {"lora_a": a, "lora_b": jnp.zeros(b_shape, dtype)}
    return {"layers": unflatten_dict(found)}


def with_adapters(base: Any, adapters: Any) -> Any:
    """The parameters with adapters beside their matrices, as a `Decoder` with an adapter takes them; nothing is copied.

    Args:
        base: the frozen parameters; None where all parameters learn, which are returned.
        adapters: those that learn.
    """
    if base is None:
        return adapters
    return {**base, **{name: with_adapters(base.get(name), own) for name, own in adapters.items()}}


def merged(base: Any, adapters: Any, scale: float) -> Any:
    """The parameters of a plain `Decoder` that computes the same: W + scale A B in place of each W that has adapters.

    Args:
        base: the frozen parameters, with stacked layers.
        adapters: of these.
        scale: `lora.adapter.scale`.
    """
    layers = dict(base["layers"])
    for part, name in _places(adapters):
        own, matrix = adapters["layers"][part][name], layers[part][name]
        a, b = widened(own["lora_a"]), widened(own["lora_b"])
        L, rank = b.shape[:2]
        change_LIO = jnp.matmul(a.reshape(L, -1, rank), b.reshape(L, rank, -1), precision="highest") * scale
        kernel = widened(matrix["kernel"]) + change_LIO.reshape(matrix["kernel"].shape)
        layers[part] = {**layers[part], name: {**matrix, "kernel": kernel.astype(matrix["kernel"].dtype)}}
    return {**base, "layers": layers}


def _places(params: Any) -> list[tuple[str, str]]:
    """Where the matrices of layers are, such as ("attention", "query")."""
    layers = params["layers"]
    return [(part, name) for part in sorted(layers) for name in sorted(layers[part]) if name in PROJECTIONS]


def _shapes(name: str, kernel_shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B beside a stacked kernel."""
    L, *axes = kernel_shape
    num_inputs = len(PROJECTIONS[name][0])
    return (L, *axes[:num_inputs], rank), (L, rank, *axes[num_inputs:])
