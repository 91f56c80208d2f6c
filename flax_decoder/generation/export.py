"""A model as one file of StableHLO, which runs without this package."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing
from flax_decoder.nn.decoder import Decoder

PLATFORMS = ("cpu", "cuda", "tpu")
# The format counts bytes in 32 bits, with a sign; the program itself takes a few of them.
MAX_BYTES = 2**31 - 2**24


def write_stablehlo(path: Path, model: Decoder, params: Any) -> None:
    """Writes the forward pass with its parameters: from tokens_BT, int32, to logits_BTV, with any batch and length.

    `jax.export.deserialize(content).call(tokens_BT)` runs it on a CPU, an NVIDIA GPU or a TPU. Attention is the
    formula, which runs on all of them. The length is at most the context of the model.

    Args:
        path: the file; it is written atomically.
        model: the network.
        params: its parameters; they become constants of the program.

    Raises:
        UserError: the parameters are more than it can hold.
    """
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if num_bytes > MAX_BYTES:
        raise UserError(f"{path}: the parameters have {num_bytes:,} bytes, but the format holds {MAX_BYTES:,} at most")
    model = Decoder(dataclasses.replace(model.config, attention="reference"))
    B, T = jax.export.symbolic_shape("B, T", constraints=[f"T<={model.config.context_length}"])

    @jax.jit
    def logits_of(tokens_BT: jax.Array) -> Any:
        return model.apply({"params": params}, tokens_BT)

    exported = jax.export.export(logits_of, platforms=PLATFORMS)(jax.ShapeDtypeStruct((B, T), jnp.int32))
    with replacing(path) as file:
        file.write(exported.serialize())
