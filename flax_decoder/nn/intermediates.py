"""What lies between tokens and logits has names; by them it can be looked at, and changed."""

from collections.abc import Callable, Iterable, Mapping

import jax
from flax import linen as nn

Edit = Callable[[jax.Array, jax.Array], jax.Array]
"""From a value and the layer it is of (an int32 scalar, traced where layers are scanned) to what takes its place."""
OwnEdits = Mapping[str, Callable[[jax.Array], jax.Array]]
"""The edits of one layer, by the name of what they change."""


EDITABLE = (
    *("embeddings", "q", "k", "v", "q_rotated", "k_rotated", "scores", "weights", "heads", "attention_write"),
    *("hidden", "feed_forward_write", "residual", "logits"),
)
"""What can be edited, in the order in which it is computed."""


def check_names(names: Iterable[str], *, has_rotation: bool) -> None:
    """Raises ValueError where a name of an edit is of nothing that there is."""
    for name in names:
        if name not in EDITABLE:
            raise ValueError(f"there is no {name!r} to edit, only {', '.join(EDITABLE)}")
        if name.endswith("_rotated") and not has_rotation:
            raise ValueError(f"edit {name.removesuffix('_rotated')} in place of {name}: positions are not rotary")


def show(module: nn.Module, name: str, value: jax.Array, edits: OwnEdits | None = None) -> jax.Array:
    """Hands a value, edited where there is an edit of that name, to whoever asks for "intermediates", and gives it."""
    value = edited(name, value, edits)
    module.sow("intermediates", name, value)
    return value


def edited(name: str, value: jax.Array, edits: OwnEdits | None) -> jax.Array:
    """What the edit of that name makes of a value, or the value itself.

    Raises:
        ValueError: the edit gives something of another shape or dtype.
    """
    if edits is None or name not in edits:
        return value
    changed = edits[name](value)
    if changed.shape != value.shape or changed.dtype != value.dtype:
        raise ValueError(
            f"the edit of {name} must give {value.dtype}{list(value.shape)}, not {changed.dtype}{list(changed.shape)}"
        )
    return changed
