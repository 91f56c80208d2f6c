import dataclasses
import itertools

import jax
import pytest

from flax_decoder.config_file import load_config
from flax_decoder.errors import UserError
from flax_decoder.planning import fitting
from flax_decoder.planning.plan import make_plan

SIZES = {
    "model.vocab_size": 16,
    "model.context_length": 8,
    "model.num_layers": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "training.batch_size": 32,
}


@pytest.fixture(scope="module")
def config():
    return load_config(None, SIZES | {"mesh.data": 8})


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config, jax.devices())


def with_capacity(plan, capacity):
    return dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, capacity=capacity))


def test_cheap_changes_come_first(config, plan):
    first = list(itertools.islice(fitting.changes(config, with_capacity(plan, 1e9)), 6))
    assert first[:4] == [
        {"model.remat": "dots"},
        {"model.remat": "heads"},
        {"model.remat": "full"},
        {"model.remat": "full", "training.accumulation_steps": 2},
    ]
    assert len({str(change) for change in first}) == len(first)


def test_a_state_that_is_too_big_is_split_first(config, plan):
    state = plan.memory.params + plan.memory.optimizer
    found = list(fitting.changes(config, with_capacity(plan, state / 3)))
    assert found[0] == {"mesh.data": 2, "mesh.fsdp": 4}
    assert {change["mesh.fsdp"] for change in found} == {4, 8}
    assert list(fitting.changes(config, with_capacity(plan, state / 100))) == []


def test_settings_in_use_are_not_proposed(plan):
    config = load_config(None, SIZES | {"model.remat": "full", "training.accumulation_steps": 32, "mesh.data": 1})
    one_device = dataclasses.replace(with_capacity(plan, 1e9), mesh={"data": 1, "fsdp": 1, "context": 1, "tensor": 1})
    assert list(fitting.changes(config, one_device)) == []


def test_the_first_change_that_fits_is_taken(config, plan, monkeypatch):
    tried = []

    def pretend(config, devices):
        tried.append((config.model.remat, config.training.accumulation_steps))
        if len(tried) == 1:
            raise UserError("does not divide")
        return with_capacity(plan, 1e9 if len(tried) == 4 else 1.0)

    monkeypatch.setattr(fitting, "make_plan", pretend)
    change, found = fitting.smallest_change(config, jax.devices(), with_capacity(plan, 1e9))
    assert tried == [("dots", 1), ("heads", 1), ("full", 1), ("full", 2)]
    assert change == {"model.remat": "full", "training.accumulation_steps": 2} and found.memory.fits


@pytest.mark.parametrize(
    ("remat", "fitting_one", "expected"),
    [("full", "none", "none"), ("full", "heads", "heads"), ("dots", "full", None), ("none", "none", None)],
)
def test_less_is_computed_again_where_memory_is_free(config, plan, monkeypatch, remat, fitting_one, expected):
    tried = []

    def pretend(config, devices):
        tried.append(config.model.remat)
        free = plan.memory.total / (fitting.FREE_ENOUGH - 0.01)
        return with_capacity(plan, free if tried[-1] == fitting_one else plan.memory.total)  # all of it is too much

    monkeypatch.setattr(fitting, "make_plan", pretend)
    found = fitting.less_remat(fitting.changed(config, {"model.remat": remat}), jax.devices(), plan)
    assert (None if found is None else found[0]["model.remat"]) == expected
    assert tried == {"none": ["none"], "heads": ["none", "dots", "heads"]}.get(expected, ["none"] * (remat == "dots"))
