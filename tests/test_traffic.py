"""What saves passes over the memory of a GPU computes the same numbers, and leaves the program of a CPU as it is."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.nn import traffic
from flax_decoder.nn.norm import normalised, with_statistics
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.planning.hlo import parse_hlo
from flax_decoder.training.loss import cross_entropy
from flax_decoder.training.step import mean_gradients

SMALL = {"model.vocab_size": 13, "model.context_length": 7, "model.num_layers": 1, "model.num_heads": 2}
SMALL |= {"model.embed_dim": 10, "training.batch_size": 4}
BIASES = dict.fromkeys(["norm_bias", "attention_in_bias", "attention_out_bias", "mlp_bias"], True)
GPT2 = {f"model.{name}": value for name, value in BIASES.items()}
LLAMA = {"model.norm": "rmsnorm", "model.feed_forward": "swiglu", "model.positions": "rotary", "model.num_heads": 1}
IN_CHUNKS = {"training.loss_chunk_tokens": 5}
ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)


@pytest.fixture
def on_gpu(monkeypatch):
    """As a program for a GPU is traced; the CPU can run it."""
    monkeypatch.setattr(traffic, "target_platform", lambda: "gpu")


def state_and_batch(changes):
    config = fd.load_config(None, SMALL | changes)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, config.model.vocab_size, (config.training.batch_size, config.model.context_length + 1))
    state = fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0))
    # Zeros, as biases are at the start, would hide what is wrong with them.
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), state.params
    )
    return state.replace(params=params), {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}


def assert_same(found, expected, tolerance):
    """Relative to the largest gradient: that of the keys' bias, for one, is 0 but for rounding."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.short("gpt2")
@pytest.mark.parametrize(
    "changes", [GPT2, LLAMA, GPT2 | {"training.loss_chunk_tokens": 5}], ids=["gpt2", "llama", "chunks"]
)
def test_loss_and_gradients_are_the_same(monkeypatch, changes):
    state, batch = state_and_batch(changes)

    def trace():
        return jax.jit(lambda *arguments: mean_gradients(*arguments)).trace(state, batch)

    plain = trace()
    monkeypatch.setattr(traffic, "target_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    other = trace()
    for name in ("optimization_barrier", " reduce["):  # the second is a sum of several numbers at once
        assert name in str(other.jaxpr) and name not in str(plain.jaxpr)
    found, expected = (traced.lower().compile()(state, batch) for traced in (other, plain))
    assert_same(found, expected, 1e-6)


@pytest.mark.short("layernorm")
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_has_the_same_derivatives(kind):
    x_RD, change_RD = (jnp.asarray(RNG.standard_normal((5, 11)) * 3 + 300, jnp.float32) for _ in range(2))

    def both(normalise):
        return jax.jvp(lambda x: normalise(kind, 1e-5, x), (x_RD,), (change_RD,))

    for one, other in zip(both(with_statistics), both(normalised), strict=True):
        # The mean of numbers near 300 is rounded at 2e-5, and their distances from it are about 3.
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_mean_and_variance_of_numbers_far_from_zero():
    """The mean of the squares less the square of the mean would have no digit right."""
    x_RD = np.float32(RNG.standard_normal((3, 1001)) + 10_000)
    mean_R1, variance_R1 = traffic.mean_and_variance(jnp.asarray(x_RD))
    np.testing.assert_allclose(mean_R1[:, 0], np.float64(x_RD).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(variance_R1[:, 0], np.float64(x_RD).var(-1), rtol=1e-3)


@pytest.mark.short("400")
@pytest.mark.parametrize("scale", [1, 400, 0])  # exp(400) overflows float32
def test_the_sum_of_exponentials_in_one_pass(scale):
    x_RV = jnp.asarray(scale * RNG.standard_normal((5, 31)), jnp.float32).at[2, 7].set(-jnp.inf)
    np.testing.assert_allclose(traffic.log_sum_exp(x_RV), jax.nn.logsumexp(x_RV, axis=-1), rtol=1e-6, atol=1e-6)
    weights_R = jnp.arange(5, dtype=jnp.float32)

    def gradient(compute):
        return jax.grad(lambda x: jnp.sum(weights_R * compute(x)))(x_RV)

    expected_RV = gradient(lambda x: jax.nn.logsumexp(x, axis=-1))
    np.testing.assert_allclose(gradient(traffic.log_sum_exp), expected_RV, rtol=1e-5, atol=1e-7)


@pytest.mark.full
def test_under_vmap(on_gpu, monkeypatch):
    """As for copies of a model that sum their gradients by themselves."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    state, batch = state_and_batch(GPT2)
    halves = jax.tree.map(lambda rows: rows.reshape(2, -1, *rows.shape[1:]), batch)
    found = jax.jit(jax.vmap(lambda batch: mean_gradients(state, batch)))(halves)
    expected = [
        jax.jit(lambda batch: mean_gradients(state, batch))(half)
        for half in ({name: rows[i] for name, rows in halves.items()} for i in range(2))
    ]
    assert_same(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected), 1e-6)


@pytest.mark.full
def test_a_loss_that_is_not_finite_stays_so(on_gpu):
    logits_BTV = jnp.asarray(RNG.standard_normal((1, 3, 7)), jnp.float32)
    for bad in (np.nan, np.inf):
        losses_BT, _ = cross_entropy(logits_BTV.at[0, 1, 2].set(bad), jnp.zeros((1, 3), jnp.int32))
        np.testing.assert_array_equal(np.isfinite(losses_BT), [[True, False, True]])


@pytest.mark.full
@pytest.mark.parametrize("axes", [{"mesh.data": 4}, {"mesh.fsdp": 2, "mesh.tensor": 2}])
def test_on_a_mesh(monkeypatch, axes):
    """The rows of each device are added there, so that no row is sent; the vocabulary may be split."""
    changes = GPT2 | {"model.vocab_size": 14, **axes}
    state, batch = state_and_batch(changes)
    expected = jax.jit(mean_gradients)(state, batch)
    monkeypatch.setattr(traffic, "target_platform", lambda: "gpu")
    mesh = make_mesh(fd.load_config(None, SMALL | changes), jax.devices()[:4])
    with use_mesh(mesh):
        batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"))))
        state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        compiled = jax.jit(lambda *arguments: mean_gradients(*arguments)).lower(state, batch).compile()
        found = compiled(state, batch)
    assert_same(found, expected, 1e-5)
    if "mesh.data" in axes:
        assert "all-gather" not in compiled.as_text()


PROGRAM = """HloModule step

%fused_update (p0: f32[10,3], p1: f32[1,3], p2: s32[]) -> f32[10,3] {
  %p0 = f32[10,3]{1,0} parameter(0)
  %p1 = f32[1,3]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %update = f32[10,3]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%fused_slice (p2: s32[], p0: f32[10,3]) -> f32[1,3] {
  %p2 = s32[] parameter(1)
  %p0 = f32[10,3]{1,0} parameter(0)
  ROOT %slice = f32[1,3]{1,0} dynamic-slice(%p0, %p2, %p2), dynamic_slice_sizes={1,3}
}

ENTRY %main (a: f32[10,3], i: s32[]) -> f32[10,3] {
  %a = f32[10,3]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,3]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/attention_norm/add"}
  %twice = f32[1,3]{1,0} multiply(%row, %row)
  %call = (f32[10,3]{1,0}, s8[4096]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul"
  %product = f32[10,3]{1,0} get-tuple-element(%call), index=0
  ROOT %result = f32[10,3]{1,0} fusion(%product, %twice, %i), kind=kLoop, calls=%fused_update
}
"""


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("memory_traffic")


def test_bytes_of_a_program(benchmark):
    rows = {row["name"]: row for row in benchmark.traffic(parse_hlo(PROGRAM))}
    num_bytes = {name: round(row["GB"] * 1e9) for name, row in rows.items()}
    assert num_bytes == {
        "row": 12 + 4 + 12,  # a row of the table, its number, the result
        "twice": 12 + 12,  # one operand, read once
        "call": 120 + 120,  # without the memory that the library works in
        "result": 12 + 4 + 12,  # an update in place: the table is not read
    }
    assert (rows["row"]["part"], rows["call"]["part"]) == ("norms", "other, products")


@pytest.mark.full
def test_the_benchmark_compares_two_runs(benchmark, tmp_path, capsys):
    file = tmp_path / "before.json"
    benchmark.main(["--tiny", "--json", str(file)])
    capsys.readouterr()
    benchmark.main(["--tiny", "--against", str(file)])
    assert "100.0%" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.full
def test_a_step_for_an_h100_moves_few_bytes(tmp_path):
    """145.5 GB per step of GPT-2 124M with 32 x 1,024 tokens without what `nn/traffic.py` does."""
    pytest.importorskip("jax_cuda13_plugin")
    file, script = tmp_path / "bytes.json", ROOT / "benchmarks" / "memory_traffic.py"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    subprocess.run([sys.executable, script, "--topology", "h100:1", "--json", file], env=environment, check=True)
    assert json.loads(file.read_text())["GB"]["all"] < 0.75 * 145.5
