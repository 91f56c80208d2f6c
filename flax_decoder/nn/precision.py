"""How many digits numbers are kept in."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_decoder.errors import UserError


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What norms, angles, scores and logits of activations in `dtype` are computed in: float64 or else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def check_float64(dtype: str) -> None:
    """Raises UserError where float64 is asked for and JAX would compute in float32 instead, its default."""
    if dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError('model.dtype = "float64" needs JAX_ENABLE_X64=1: without it JAX computes in float32')
