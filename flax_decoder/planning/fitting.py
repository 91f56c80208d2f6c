"""Which settings to change so that a training step fits."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from flax_decoder.config import Config
from flax_decoder.errors import UserError
from flax_decoder.planning.plan import Plan, make_plan

MAX_TRIES = 8  # each compiles the step
# From least to most memory saved and time spent.
REMAT = ("none", "attention", "dots", "heads", "full")
# A step may take this part of the memory that there is: what it takes is not known to the last byte before it runs.
FREE_ENOUGH = 0.9


def smallest_change(config: Config, devices: list[Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
    """The first of `changes` with which the step fits, and its plan; None if none of those tried does."""
    for change in itertools.islice(changes(config, plan), MAX_TRIES):
        try:
            tried = make_plan(changed(config, change), devices)
        except UserError:  # a size that does not divide
            continue
        if tried.memory.fits:
            return change, tried
    return None


def less_remat(config: Config, devices: list[Any], plan: Plan) -> tuple[dict[str, Any], Plan] | None:
    """The least recomputation with which the step still fits well, and its plan; None if that is what it has."""
    for change in _remats(REMAT[: REMAT.index(config.model.remat)]):
        tried = make_plan(changed(config, change), devices)
        if tried.memory.capacity is not None and tried.memory.total <= FREE_ENOUGH * tried.memory.capacity:
            return change, tried
    return None


def changes(config: Config, plan: Plan) -> Iterator[dict[str, Any]]:
    """Overrides by dotted name that make a step smaller, the cheapest in time first.

    Split parameters cost communication, recomputed activations a third more products, and accumulation repeats the
    communication of fsdp in each part.
    """
    remats = _remats(REMAT[REMAT.index(config.model.remat) + 1 :])
    rows, parts = config.training.rows_per_device, config.training.accumulation_steps
    accumulations: list[dict[str, Any]] = []
    while rows is not None and rows > 1:
        rows //= 2
        accumulations.append({"training.rows_per_device": rows})
    while rows is None and config.training.batch_size % (2 * parts) == 0:
        parts *= 2
        accumulations.append({"training.accumulation_steps": parts})
    meshes = _meshes(plan)
    for mesh in meshes[:1] + meshes[1:][-1:]:  # the least split that can hold the state, and the largest
        for remat in [{}, *remats]:
            if mesh or remat:
                yield mesh | remat
        for accumulation in accumulations:
            yield mesh | (remats[-1] if remats else {}) | accumulation


def _remats(policies: Sequence[str]) -> list[dict[str, Any]]:
    """Overrides with these policies. "attention" is not proposed: fast attention stores no scores anyway."""
    return [{"model.remat": policy} for policy in policies if policy != "attention"]


def changed(config: Config, change: dict[str, Any]) -> Config:
    """The config with some fields replaced, by dotted name."""
    for name, value in change.items():
        section, _, field = name.partition(".")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def _meshes(plan: Plan) -> list[dict[str, Any]]:
    """The mesh as it is, then with more and more of `data` moved to `fsdp`; only those whose state fits a chip."""
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    meshes: list[dict[str, Any]] = [{}]
    while data % 2 == 0:
        data, fsdp = data // 2, fsdp * 2
        meshes.append({"mesh.data": data, "mesh.fsdp": fsdp})
    state_bytes, capacity = plan.memory.params + plan.memory.optimizer, plan.memory.capacity or 0
    return [mesh for i, mesh in enumerate(meshes) if state_bytes / 2**i < capacity]
