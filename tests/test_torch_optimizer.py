"""Training goes on where it stood, from PyTorch here and from here in PyTorch."""

import functools
import math

import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402
import jax
import numpy as np
import optax
import plain_gpt

import flax_decoder as fd
from flax_decoder.huggingface.nanogpt import model_entries, read_model
from flax_decoder.training.optimizer import num_updates

B, STEPS, HALF = 4, 50, 25
# The settings of `plain_gpt`, in our names.
MODEL = {
    **{"vocab_size": 5, "context_length": 11, "num_layers": 2, "embed_dim": 14, "num_heads": 2},
    **dict.fromkeys(("norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias"), True),
    "scan_layers": True,  # compiles one block
}
OPTIMIZER = {
    **{"learning_rate": 3e-3, "final_fraction": 1 / 3, "warmup_steps": 0, "beta2": 0.95},
    **{"weight_decay": 0.3, "clip_norm": 0.5},
}


def make_state(**optimizer):
    model = {f"model.{name}": value for name, value in MODEL.items()}
    values = {f"optimizer.{name}": value for name, value in (OPTIMIZER | optimizer).items()}
    config = fd.load_config(None, {**model, **values, "training.num_steps": STEPS})
    return fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))


@functools.cache
def start():
    """Our state before the first step, with the weights of the module; one state, so one compiled step."""
    module, model_args = plain_gpt.make_gpt()
    params = read_model(plain_gpt.checkpoint(module, model_args), "ckpt.pt")[1]
    return make_state().replace(params=params)


def batch_of(step):
    """The batch of a step, for both."""
    tokens_BT = np.random.default_rng(step).integers(0, 5, (B, 12), dtype=np.int32)
    tokens_BT[:, 1::2] = tokens_BT[:, ::2]  # something to learn
    return {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}


def in_order(module):
    """The parameters in the order of the optimizer's groups: matrices, then vectors."""
    return dict(sorted(module.named_parameters(), key=lambda item: item[1].dim() < 2))


def torch_steps(module, optimizer, steps):
    """Trains as nanoGPT does; returns the losses."""
    losses = []
    for step in steps:
        rate = 1e-3 + 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (3e-3 - 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {name: torch.tensor(tokens, dtype=torch.int64) for name, tokens in batch_of(step).items()}
        loss = torch.nn.functional.cross_entropy(module(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


take_step = jax.jit(fd.train_step)


def jax_steps(state, steps):
    losses = []
    for step in steps:
        state, metrics = take_step(state, batch_of(step))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def reference_losses():
    module, _ = plain_gpt.make_gpt()
    return torch_steps(module, plain_gpt.make_optimizer(module), range(STEPS))


@functools.cache
def half_in_pytorch():
    """Module and optimizer after half of the steps, and the losses."""
    module, _ = plain_gpt.make_gpt()
    optimizer = plain_gpt.make_optimizer(module)
    return module, optimizer, torch_steps(module, optimizer, range(HALF))


def from_torch(state, module, optimizer):
    params = read_model(plain_gpt.checkpoint(module, plain_gpt.MODEL_ARGS), "ckpt.pt")[1]
    return fd.adamw_from_torch(state.replace(params=params), optimizer.state_dict(), in_order(module), "nanogpt")


def to_torch(state):
    """A module and an optimizer that go on from a state of ours."""
    module = plain_gpt.PlainGPT(**plain_gpt.MODEL_ARGS)
    module.load_state_dict(model_entries(fd.ModelConfig(**MODEL), state.params)["model"])
    optimizer = plain_gpt.make_optimizer(module)
    optimizer.load_state_dict(fd.adamw_to_torch(state, optimizer.state_dict(), in_order(module), "nanogpt"))
    return module, optimizer


@pytest.mark.full
def test_half_in_pytorch_and_half_here_is_the_whole():
    state = from_torch(start(), *half_in_pytorch()[:2])
    assert int(state.step) == num_updates(state.opt_state) == HALF
    assert jax.tree.structure(state) == jax.tree.structure(start())  # so nothing compiles anew
    losses = half_in_pytorch()[2] + jax_steps(state, range(HALF, STEPS))[1]
    np.testing.assert_allclose(losses, reference_losses(), atol=1e-5)


@pytest.mark.full
def test_half_here_and_half_in_pytorch_is_the_whole():
    state, losses = jax_steps(start(), range(HALF))
    losses += torch_steps(*to_torch(state), range(HALF, STEPS))
    np.testing.assert_allclose(losses, reference_losses(), atol=1e-5)


@pytest.mark.full
def test_the_whole_here_is_the_whole_in_pytorch():
    np.testing.assert_allclose(jax_steps(start(), range(STEPS))[1], reference_losses(), atol=1e-5)


@pytest.mark.short("float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_gives_the_same_bits(dtype):
    state = from_torch(make_state(moments_dtype=dtype), *half_in_pytorch()[:2])
    again = from_torch(make_state(moments_dtype=dtype), *to_torch(state))
    jax.tree.map(np.testing.assert_array_equal, again.opt_state, state.opt_state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 0} == {dtype}


@pytest.mark.full
def test_before_the_first_step_all_is_zero():
    module, _ = plain_gpt.make_gpt()
    state = from_torch(from_torch(start(), *half_in_pytorch()[:2]), module, plain_gpt.make_optimizer(module))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.opt_state, state.step)))
    assert to_torch(state)[1].state_dict()["state"] == {}


def test_an_optimizer_of_optax_and_a_map_of_names_do_as_well():
    """The map is that of somebody's own module, whose head has the name of what is the embedding."""
    module, optimizer, _ = half_in_pytorch()
    named = {"_orig_mod." + name: p for name, p in in_order(module).items()}
    named = {"lm_head.weight" if name.endswith("wte.weight") else name: p for name, p in named.items()}
    plain = fd.TrainState.create(apply_fn=start().apply_fn, params=start().params, tx=optax.adamw(1e-3))
    state = fd.adamw_from_torch(plain, optimizer.state_dict(), named, "nanogpt")
    assert num_updates(state.opt_state) == int(state.step) == HALF
    row = optimizer.state[module.transformer["h"][1].mlp["c_fc"].weight]
    for moment, theirs in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        up_LDF = optax.tree.get(state.opt_state, moment)["layers"]["feed_forward"]["up"]["kernel"]
        np.testing.assert_array_equal(up_LDF[1], row[theirs].numpy().T)
    layer = "transformer.h.{}."
    names = {
        **{"transformer.wte.weight": "embedding", "transformer.wpe.weight": "positions"},
        **{f"transformer.ln_f.{kind}": f"final_norm/{ours}" for kind, ours in KINDS},
        **{
            f"{layer}{theirs}.{kind}": f"layers/{module}/{ours}"
            for theirs, module in (("ln_1", "attention_norm"), ("ln_2", "feed_forward_norm"))
            for kind, ours in KINDS
        },
        **{
            f"{layer}{theirs}.{kind}": [f"layers/{module}/{kind.replace('weight', 'kernel')}" for module in modules]
            for theirs, modules in LINEARS.items()
            for kind in ("weight", "bias")
        },
    }
    by_map = fd.adamw_from_torch(plain, optimizer.state_dict(), in_order(module), names)
    jax.tree.map(np.testing.assert_array_equal, by_map.opt_state, state.opt_state)


KINDS = (("weight", "scale"), ("bias", "bias"))
LINEARS = {
    "attn.c_attn": ["attention/query", "attention/key", "attention/value"],
    "attn.c_proj": ["attention/out"],
    "mlp.c_fc": ["feed_forward/up"],
    "mlp.c_proj": ["feed_forward/down"],
}


def other(optimizer, **changes):
    """The state of an optimizer, with other entries for its first parameter."""
    state = optimizer.state_dict()
    return state | {"state": state["state"] | {0: {**state["state"][0], **changes}}}


def without(optimizer, index):
    state = optimizer.state_dict()
    return state | {"state": {key: row for key, row in state["state"].items() if key != index}}


REFUSED = {
    "no optimizer": (lambda optimizer: {"lr": 1}, "is not the state of an optimizer"),
    "amsgrad": (
        lambda optimizer: optimizer.state_dict() | {"param_groups": [{"params": [], "amsgrad": True}]},
        "amsgrad is on",
    ),
    "momentum": (lambda optimizer: without(optimizer, 0) | {"state": {0: {"momentum_buffer": 1}}}, "has no step, exp"),
    "fewer": (lambda optimizer: optimizer.state_dict() | {"param_groups": [{"params": [0]}]}, "has 1 parameters"),
    "twice": (lambda optimizer: optimizer.state_dict() | {"param_groups": [{"params": [0] * 28}]}, "each once"),
    "other steps": (lambda optimizer: other(optimizer, step=3), "have 3 updates, others 25"),
    "one without": (lambda optimizer: without(optimizer, 3), "have 0 updates, others 25"),
    "half a step": (lambda optimizer: other(optimizer, step=2.5), "step = 2.5 of transformer.wte.weight"),
    "no step": (lambda optimizer: other(optimizer, step="x"), "step = 'x' of transformer.wte.weight"),
    "no tensor": (lambda optimizer: other(optimizer, exp_avg=[1]), "exp_avg = [1] of transformer.wte.weight"),
    "shape": (lambda optimizer: other(optimizer, exp_avg=torch.ones(3)), "has the shape (3,)"),
    "nan": (lambda optimizer: other(optimizer, exp_avg_sq=torch.full((5, 14), torch.nan)), "holds nan"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_optimizer_is_refused(kind):
    module, optimizer, _ = half_in_pytorch()
    change, part = REFUSED[kind]
    with pytest.raises(fd.UserError) as caught:
        fd.adamw_from_torch(start(), change(optimizer), in_order(module), "nanogpt", source="ckpt.pt: optimizer")
    message = str(caught.value)
    assert part in message and message.startswith("ckpt.pt: optimizer: ") and len(message.splitlines()) <= 2


def test_parameters_in_another_order_are_refused():
    """Else the moments of one would become those of another; equal shapes alone cannot show it."""
    module, optimizer, _ = half_in_pytorch()
    for function in (fd.adamw_from_torch, fd.adamw_to_torch):
        with pytest.raises(fd.UserError, match="gpt3' is not known"):
            function(start(), optimizer.state_dict(), in_order(module), "gpt3")
        with pytest.raises(fd.UserError, match="the two models differ"):
            function(start(), optimizer.state_dict(), in_order(module), "gpt2")
    with pytest.raises(fd.UserError, match="has the shape"):
        fd.adamw_from_torch(start(), optimizer.state_dict(), dict(module.named_parameters()), "nanogpt")


@pytest.mark.full
def test_muon_is_refused():
    module, optimizer, _ = half_in_pytorch()
    with pytest.raises(fd.UserError, match="is not AdamW for all parameters"):
        fd.adamw_from_torch(make_state(name="muon"), optimizer.state_dict(), in_order(module), "nanogpt")
