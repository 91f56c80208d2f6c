"""How a train state is shown: in one line, whatever its leaves are."""

from typing import Any

import jax


def describe_state(state: Any) -> str:
    """Step, parameters, optimizer, seed, and the other static settings that differ from the defaults of a `TrainState`.

    Of its arrays, only the step is read. The leaves may also be tracers, shapes, shardings, or what else a
    tree of this structure can hold.
    """
    settings = {
        name: getattr(state, name) for name in ("accumulation_steps", "z_loss", "loss_chunk_tokens", "skip_spikes")
    }
    parts = [f"step={_value(state.step)}", f"params={_size(state.params)}"]
    parts += [] if state.frozen is None else [f"frozen={_size(state.frozen)}"]
    parts.append(f"optimizer={' + '.join(_kinds(state.opt_state)) or None}: {_size(state.opt_state)}")
    parts.append(f"seed={state.seed}")
    parts += [f"{name}={value}" for name, value in settings.items() if value != getattr(type(state), name)]
    return f"{type(state).__name__}({', '.join(parts)})"


def _value(step: Any) -> str:
    """The number of a step, or what stands in for it."""
    if isinstance(step, jax.core.Tracer) or getattr(step, "shape", None) != ():
        return _leaf(step)
    try:
        return str(int(step))
    except (TypeError, RuntimeError):  # a shape; or a donated array, or one of other processes
        return _leaf(step)


def _leaf(leaf: Any) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return type(leaf).__name__ if shape is None or dtype is None else f"{dtype}{list(shape)}"


def _size(tree: Any) -> str:
    """How many numbers a tree has, and of which dtypes."""
    leaves = jax.tree.leaves(tree)
    if not all(hasattr(leaf, "size") and hasattr(leaf, "dtype") for leaf in leaves):
        return f"{len(leaves)} x {' | '.join(sorted({type(leaf).__name__ for leaf in leaves}))}"
    dtypes = " and ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    return f"{sum(leaf.size for leaf in leaves):,} of {dtypes}" if leaves else "0"


def _kinds(opt_state: Any) -> list[str]:
    """What an optimizer is made of, by the names of optax' states that hold numbers for each parameter."""
    found = []
    if isinstance(opt_state, tuple | list | dict):
        if {"mu", "nu", "trace"} & set(getattr(opt_state, "_fields", ())):
            found.append(type(opt_state).__name__.removeprefix("ScaleBy").removesuffix("State"))
        for part in opt_state.values() if isinstance(opt_state, dict) else opt_state:
            found += _kinds(part)
    return list(dict.fromkeys(found))
