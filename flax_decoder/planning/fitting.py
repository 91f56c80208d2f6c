"""What to change where a training step does not fit."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from flax_decoder.config import Config
from flax_decoder.errors import UserError
from flax_decoder.planning.plan import Plan, make_plan

# Each try compiles the step anew.
MAX_TRIES = 8
# Lighter on memory and heavier on time from left to right. "attention" is not proposed: what is fast holds no scores.
REMAT = ("none", "attention", "dots", "full")


def smallest_change(config: Config, devices: list[Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
    """The first of `changes` that makes a step fit, as overrides by dotted name, and its plan; None where none does.

    Args:
        config: the run.
        devices: the devices.
        plan: that of a step that does not fit.
    """
    for change in itertools.islice(changes(config, plan), MAX_TRIES):
        try:
            tried = make_plan(changed(config, change), devices)
        except UserError:  # a size that does not divide
            continue
        if tried.memory.fits:
            return change, tried
    return None


def changes(config: Config, plan: Plan) -> Iterator[dict[str, Any]]:
    """Settings that make a step smaller, those first that cost the least time, as overrides by dotted name.

    Split parameters cost messages, activations that are computed again cost a third of the products, and a batch in
    parts costs all messages once more for each part.
    """
    meshes = [mesh for mesh in _meshes(plan) if _state_bytes(plan, mesh) < (plan.memory.capacity or 0)]
    heavier = REMAT[REMAT.index(config.model.remat) + 1 :]
    remats = [{"model.remat": policy} for policy in heavier if policy != "attention"]
    parts = []
    rows = config.training.batch_size // config.training.accumulation_steps
    while rows % 2 == 0:
        rows //= 2
        parts.append({"training.accumulation_steps": config.training.batch_size // rows})
    # The least split that can hold the state at all, then the most there is.
    for mesh in dict.fromkeys(map(_frozen, [*meshes[:1], *meshes[-1:]])):
        for remat in [{}, *remats]:
            if mesh or remat:
                yield {**dict(mesh), **remat}
        for part in parts:
            yield {**dict(mesh), **(remats[-1] if remats else {}), **part}


def changed(config: Config, change: dict[str, Any]) -> Config:
    """The run with some settings replaced."""
    for name, value in change.items():
        section, _, field = name.partition(".")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def _meshes(plan: Plan) -> Iterator[dict[str, int]]:
    """The mesh as it is, then with more and more of its copies of the parameters split instead."""
    yield {}
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    while data % 2 == 0:
        data, fsdp = data // 2, fsdp * 2
        yield {"mesh.data": data, "mesh.fsdp": fsdp}


def _state_bytes(plan: Plan, mesh: dict[str, int]) -> float:
    split = mesh["mesh.fsdp"] / plan.mesh["fsdp"] if mesh else 1
    return (plan.memory.params + plan.memory.optimizer) / split


def _frozen(mesh: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(mesh.items())
