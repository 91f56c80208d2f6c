"""The dtypes that numbers are computed in."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_decoder.errors import UserError


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of norms, angles, scores and logits for activations in `dtype`: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widened(params: Any) -> Any:
    """Params of which those in bfloat16 and float16 are in float32, exactly the same numbers; a tree like `params`."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else leaf, params
    )


def check_float64(dtype: str) -> None:
    """Raises UserError for float64 if JAX would compute in float32 instead, its default."""
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError('model.dtype = "float64" needs JAX_ENABLE_X64=1: without it JAX computes in float32')
