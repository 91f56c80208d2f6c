"""Each implementation of attention equals the readable one on all it knows, and refuses the rest before it starts."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.nn.attention import dot_product_attention
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels import choice, splash
from flax_decoder.nn.kernels.choice import choose_kernel, on_each_device, slower_attention
from flax_decoder.nn.kernels.cudnn import cudnn
from flax_decoder.nn.kernels.platform import target_platform
from flax_decoder.nn.mask import MaskSpec
from flax_decoder.parallel.mesh import mesh_of, use_mesh

# The smallest block that the TPU kernel knows: a few of them already make a sequence.
BLOCK = 128

# float32 rounds at 6e-8; sums over up to 300 keys, in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _lenient():
    """Kernels of others promote as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def _small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK_TOKENS", BLOCK)


def random_qkv(B, T, N, K, H):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K)]


def in_order(window, length):
    """The mask of whole sequences."""
    positions_1T = jnp.arange(length, dtype=jnp.int32)[None]
    return MaskSpec(positions_1T, positions_1T, window=window)


def masked(attend, window=None, **settings):
    """An implementation as a function of queries, keys and values alone."""
    return lambda q, k, v: attend(q, k, v, in_order(window, q.shape[1]), **settings)


def readable(q_BTNH, k_BSKH, v_BSKH, **settings):
    return masked(dot_product_attention, **settings)(q_BTNH, k_BSKH, v_BSKH)


def heads_and_gradients(attend, qkv):
    """What attention gives, and its gradients by queries, keys and values under random weights."""
    weights_BTNH = np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32)

    def weighted(qkv):
        heads_BTNH = attend(*qkv)
        return (weights_BTNH * heads_BTNH).sum(), heads_BTNH

    gradients, heads_BTNH = jax.jit(jax.grad(weighted, has_aux=True))(qkv)
    return heads_BTNH, gradients


def assert_equal(found, expected, tolerance=TOLERANCE):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=1e-4), found, expected)


# --- Splash, interpreted on CPU ---


@pytest.mark.short("sizes3-settings3")
@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((2, BLOCK, 3, 3, 5), {"window": None}),  # one whole block, heads of an odd width
        ((1, 2 * BLOCK + 3, 6, 2, 8), {"window": None, "soft_cap": 0.9}),  # grouped heads; padding
        ((2, BLOCK + 1, 4, 1, 7), {"window": 13, "scale": 0.17}),  # one key head; a window within a block
        ((1, 2 * BLOCK + 3, 2, 2, 4), {"window": BLOCK + 5, "soft_cap": 0.7, "scale": 1.3}),  # a window across blocks
        ((1, 3, 2, 1, 4), {"window": 1}),  # less than a block, and each query sees itself alone
        ((1, BLOCK - 1, 2, 2, 4), {"window": 10 * BLOCK}),  # a window that no sequence fills
    ],
)
def test_splash_gives_the_same_heads_and_gradients(sizes, settings):
    qkv = random_qkv(*sizes)
    found = heads_and_gradients(masked(splash.splash, **settings), qkv)
    expected = heads_and_gradients(functools.partial(readable, **settings), qkv)
    assert_equal(found, expected)
    assert np.abs(expected[0]).max() > 0.5


@pytest.mark.usefixtures("_small_blocks")
def test_splash_computes_bfloat16_with_float32_scores():
    qkv = [jnp.asarray(array, jnp.bfloat16) for array in random_qkv(1, BLOCK + 1, 2, 1, 8)]
    heads = masked(splash.splash)(*qkv)
    exact = readable(*(array.astype(jnp.float32) for array in qkv), window=None)
    assert heads.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits, of queries once more after scaling and of the result, which are up to 3.
    np.testing.assert_allclose(heads.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize(
    ("num_tokens", "head_width", "num_bytes", "expected"),
    [
        (8192, 128, 2, 1024),
        (8192, 64, 2, 1024),  # vectors are 128 wide, whatever is in them
        (8192, 256, 2, 512),
        (8192, 128, 4, 512),
        (8192, 640, 4, BLOCK),  # never less than a vector
        (1536, 128, 2, 512),  # blocks of 1024 would add a third
        (1920, 128, 2, 1024),  # 128 more tokens are cheaper than small blocks
        (7, 16, 2, BLOCK),
    ],
)
def test_blocks_are_as_large_as_memory_and_padding_allow(num_tokens, head_width, num_bytes, expected):
    assert splash.block_size(num_tokens, head_width, num_bytes) == expected


# --- cuDNN: its arguments, as JAX itself computes them; the kernel needs a GPU ---


@pytest.mark.short("settings0", "settings2")
@pytest.mark.parametrize("settings", [{"window": None}, {"window": 1}, {"window": 5, "scale": 0.17}])
def test_cudnn_is_asked_for_the_same_attention(settings, monkeypatch):
    asked = {}

    def without_a_gpu(*qkv, implementation, **arguments):
        asked["implementation"] = implementation
        return jax_attention(*qkv, implementation="xla", **arguments)

    jax_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", without_a_gpu)
    qkv = random_qkv(2, 11, 6, 2, 8)
    found = heads_and_gradients(masked(cudnn, **settings), qkv)
    assert_equal(found, heads_and_gradients(functools.partial(readable, **settings), qkv))
    assert asked == {"implementation": "cudnn"}


# --- Which one runs where ---

KIND = {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5"}
MODEL = {"vocab_size": 13, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 7, "context_length": 300}
BFLOAT16 = {"dtype": "bfloat16"}


@contextlib.contextmanager
def traced_for(platform, **axes):
    """Programs are traced for a mesh of devices that are not at hand, as `flax-decoder plan` does."""
    axes = axes or {"data": 2}
    device = AbstractDevice(device_kind=KIND[platform], num_cores=1, platform=platform)
    kinds = (AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("cpu", {}, "blockwise"),
        ("cpu", BFLOAT16 | {"attention_soft_cap": 3.0, "positions": "alibi"}, "blockwise"),
        ("gpu", BFLOAT16, "cudnn"),
        ("gpu", BFLOAT16 | {"window": 3, "num_kv_heads": 1, "attention_scale": 0.2}, "cudnn"),
        ("gpu", {}, "reference"),
        ("gpu", BFLOAT16 | {"positions": "alibi"}, "reference"),
        ("gpu", BFLOAT16 | {"attention_soft_cap": 3.0}, "reference"),
        ("gpu", BFLOAT16 | {"head_dim": 12}, "reference"),
        ("gpu", BFLOAT16 | {"head_dim": 136}, "reference"),  # a GPU that is not at hand might be an Ampere
        ("tpu", BFLOAT16, "splash"),
        ("tpu", {"attention_soft_cap": 3.0, "window": 3, "num_kv_heads": 1, "attention_scale": 0.2}, "splash"),
        ("tpu", {"positions": "alibi"}, "reference"),
        ("tpu", {"dtype": "float64"}, "reference"),
        ("tpu", {"attention": "reference"}, "reference"),
        ("gpu", BFLOAT16 | {"attention": "blockwise"}, "blockwise"),
    ],
)
def test_the_choice_follows_the_devices_and_the_settings(platform, settings, expected):
    with traced_for(platform):
        assert choose_kernel(ModelConfig(**MODEL | settings)) == expected


def test_without_a_mesh_the_choice_follows_the_default_device():
    assert choose_kernel(ModelConfig()) == "blockwise"
    assert target_platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert target_platform() == "cpu"


def test_many_tpus_without_a_mesh_stay_readable(monkeypatch):
    """Arrays may be split over them, and the compiler does not split a kernel."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose_kernel(ModelConfig()) == "reference"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose_kernel(ModelConfig()) == "splash"


@pytest.mark.parametrize(
    ("capability", "head_dim", "expected"),
    [
        ("9.0", 256, "cudnn"),
        ("8.6", 128, "cudnn"),
        ("8.6", 136, "reference"),
        ("10.0", 136, "cudnn"),
        ("7.5", 64, "reference"),
        ("gfx942", 64, "reference"),
    ],
)
def test_the_choice_follows_the_generation_of_the_gpu(capability, head_dim, expected, monkeypatch):
    gpu = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(choice, "failure", lambda *sizes: None)
    assert choose_kernel(ModelConfig(**BFLOAT16, head_dim=head_dim)) == expected
    if expected != "cudnn":
        with pytest.raises(fd.UserError, match=r'model.attention = "cudnn" .* use model.attention = "auto"'):
            choose_kernel(ModelConfig(**BFLOAT16, head_dim=head_dim, attention="cudnn"))


def test_a_kernel_that_fails_is_not_taken(monkeypatch):
    """It is tried once, also where a program is traced and a mesh is set. Here it fails, as there is no GPU."""
    attempts = []

    def kernel(q_BTNH, k_BSKH, v_BSKH, mask):
        attempts.append((q_BTNH.shape[2:], k_BSKH.shape[2:], jax.sharding.get_abstract_mesh().empty))
        return dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask)

    choice.failure.cache_clear()
    monkeypatch.setattr(choice, "target_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    config = ModelConfig(**MODEL | BFLOAT16)
    assert choose_kernel(config) == "reference"
    line = slower_attention(config)
    assert line.startswith("attention is computed by its formula, as cudnn fails on this device: ") and "\n" not in line
    with pytest.raises(fd.UserError, match=r'"cudnn" fails on this device: .*; use model.attention = "auto"'):
        choose_kernel(dataclasses.replace(config, attention="cudnn"))

    choice.failure.cache_clear()
    monkeypatch.setitem(choice.FUSED, "cudnn", kernel)
    chosen = []

    def traced(x):
        chosen.extend(choose_kernel(config) for _ in range(2))
        return x

    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        jax.jit(traced)(1)
    assert chosen == ["cudnn", "cudnn"]
    assert attempts == [((config.num_heads, config.head_width), (config.kv_heads, config.head_width), True)]
    assert slower_attention(config) is None
    choice.failure.cache_clear()


@pytest.mark.parametrize(
    ("settings", "has_documents", "reason"),
    [
        ({}, False, 'computes in bfloat16, not in dtype = "float32"'),
        (BFLOAT16 | {"dropout": 0.2}, False, "never holds the weights that dropout = 0.2 zeroes in training"),
        (BFLOAT16, True, "has no documents"),
        (BFLOAT16, False, None),
        ({"attention": "reference"}, False, None),
    ],
)
def test_the_line_that_says_why_attention_is_not_fused(settings, has_documents, reason):
    with traced_for("gpu"):
        line = slower_attention(ModelConfig(**MODEL | settings), has_documents=has_documents)
    assert line is None if reason is None else f"as cudnn {reason}" in line
    assert slower_attention(ModelConfig(**MODEL | settings)) is None  # a CPU has no fused kernel


@pytest.mark.parametrize(
    ("platform", "settings", "message"),
    [
        ("cpu", BFLOAT16 | {"attention": "cudnn"}, 'model.attention = "cudnn" needs an NVIDIA GPU, .* runs on cpu'),
        ("tpu", BFLOAT16 | {"attention": "cudnn"}, 'model.attention = "cudnn" needs an NVIDIA GPU, .* runs on tpu'),
        ("gpu", {"attention": "splash"}, 'model.attention = "splash" is a kernel for TPUs .* not for this gpu'),
    ],
)
def test_what_does_not_run_on_the_devices_is_refused(platform, settings, message):
    with traced_for(platform), pytest.raises(fd.UserError, match=message):
        choose_kernel(ModelConfig(**MODEL | settings))


def test_documents_take_a_kernel_that_has_them():
    settings = MODEL | BFLOAT16
    with traced_for("gpu"):
        assert choose_kernel(ModelConfig(**settings), has_documents=True) == "reference"
        with pytest.raises(fd.UserError, match=r'"cudnn" has no documents .* use model.attention = "auto"'):
            choose_kernel(ModelConfig(**settings, attention="cudnn"), has_documents=True)
    with traced_for("tpu"):
        assert choose_kernel(ModelConfig(**settings), has_documents=True) == "splash"


# --- In the network ---

TOKENS_BT = np.random.default_rng(2).integers(0, 13, (4, BLOCK + 3)).astype(np.int32)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "positions": "rotary"}


def logits_and_gradients(config, tokens_BT=TOKENS_BT):
    model = Decoder(config)
    params = reference.random_params(model)
    weights_BTV = np.random.default_rng(3).standard_normal((*tokens_BT.shape, 13)).astype(np.float32)

    def weighted(params):
        logits_BTV = model.apply({"params": params}, tokens_BT)
        return (weights_BTV * logits_BTV).mean(), logits_BTV

    gradients, logits_BTV = jax.jit(jax.grad(weighted, has_aux=True))(params)
    return logits_BTV, gradients


@pytest.mark.full
def test_each_layer_of_a_scan_has_its_own_window():
    """Three layers in a pattern of two: one turn of the loop, and one layer left over."""
    settings = HEADS | {"num_layers": 3, "window": 9, "window_pattern": (True, False), "rotary_window_base": 97.0}
    config = ModelConfig(**MODEL | settings, attention="splash", scan_layers=True, remat="full")
    expected = logits_and_gradients(dataclasses.replace(config, attention="reference", scan_layers=False, remat="none"))
    assert_equal(logits_and_gradients(config), expected, 5e-5)


def test_splash_is_split_over_a_mesh():
    config = ModelConfig(**MODEL | HEADS, attention="splash", window=9)
    expected = logits_and_gradients(dataclasses.replace(config, attention="reference"))
    with use_mesh(mesh_of(jax.devices(), data=2, fsdp=2, tensor=2)):
        assert_equal(logits_and_gradients(config), expected, 5e-5)


@pytest.mark.parametrize(
    ("sizes", "own_sizes"),
    [
        ((4, 4, 2), (1, 2, 1)),  # rows over data and fsdp, heads over tensor
        ((3, 4, 2), (3, 2, 1)),  # three rows do not divide by four: all devices compute them
        ((8, 6, 3), (2, 6, 3)),  # key heads do not divide by two: query heads stay with them
    ],
)
def test_each_device_has_its_rows_and_heads(sizes, own_sizes):
    def attend(q_BTNH, k_BSKH, v_BSKH, mask):
        assert (*q_BTNH.shape[::2], k_BSKH.shape[2]) == own_sizes and v_BSKH.shape == k_BSKH.shape
        return q_BTNH

    qkv = random_qkv(sizes[0], 5, *sizes[1:], 4)
    with use_mesh(mesh_of(jax.devices(), data=2, fsdp=2, tensor=2)):
        np.testing.assert_array_equal(jax.jit(masked(functools.partial(on_each_device, attend)))(*qkv), qkv[0])


def test_within_pmap_and_shard_map_there_is_nothing_left_to_split():
    """The names of the mesh are taken already: the kernel runs on what the device has."""
    qkv = random_qkv(8, BLOCK, 2, 1, 4)
    attend = masked(functools.partial(on_each_device, splash.splash), window=5)
    expected_BTNH = readable(*qkv, window=5)
    rows = [array.reshape(8, 1, *array.shape[1:]) for array in qkv]
    mapped = jax.pmap(attend)(*rows)
    np.testing.assert_allclose(np.asarray(mapped).reshape(expected_BTNH.shape), expected_BTNH, atol=TOLERANCE)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    by_hand = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(*qkv)
    np.testing.assert_allclose(by_hand, expected_BTNH, atol=TOLERANCE)


@pytest.mark.short("splash")
@pytest.mark.parametrize("attention", ["blockwise", "splash"])
def test_tokens_in_another_order_take_the_readable_path(attention):
    config = ModelConfig(**MODEL | HEADS, attention=attention)
    params = reference.random_params(Decoder(config))
    order_T = np.random.default_rng(4).permutation(TOKENS_BT.shape[1]).astype(np.int32)
    apply = jax.jit(Decoder(config).apply)
    in_order_BTV = apply({"params": params}, TOKENS_BT)
    found_BTV = apply({"params": params}, TOKENS_BT[:, order_T], positions_BT=order_T[None])
    np.testing.assert_allclose(found_BTV, in_order_BTV[:, order_T], atol=5e-5)


def test_a_model_for_gpus_starts_decodes_and_is_looked_into_anywhere():
    """These take the readable path; what needs the kernel says so."""
    model = Decoder(ModelConfig(**MODEL | BFLOAT16, attention="cudnn"))
    tokens_BT = TOKENS_BT[:, :5]
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)["params"]
    _, cache = jax.jit(model.apply)({"params": params}, tokens_BT, empty_cache(model.config, 4, 7))
    assert cache.length_B.tolist() == [5] * 4
    look = functools.partial(model.apply, mutable=["intermediates"])
    _, seen = jax.eval_shape(look, {"params": params}, tokens_BT)
    assert seen["intermediates"]["layers"]["attention"]["weights"][0].shape == (1, 4, 2, 1, 5, 5)
    with pytest.raises(fd.UserError, match=r'model.attention = "cudnn" needs an NVIDIA GPU'):
        model.apply({"params": params}, tokens_BT)


# --- Programs for devices that are not at hand: lowered, as far as this can be done without their compilers ---


def lowered(platform, config, tokens_BT=TOKENS_BT, **arguments):
    """The program of a forward and backward pass for a mesh of two devices."""
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BT[:, :1])["params"]

    def loss(params):
        return model.apply({"params": params}, tokens_BT, **arguments).astype(jnp.float32).mean()

    with traced_for(platform), nn.logical_axis_rules((("batch", "data"), ("heads", None))):
        return jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(PLATFORM[platform],)).as_text()


PLATFORM = {"tpu": "tpu", "gpu": "cuda"}


@pytest.mark.short("settings1")
@pytest.mark.parametrize("settings", [{}, {"window": 9, "attention_soft_cap": 3.0}])
def test_a_program_for_tpus_holds_the_kernel_and_no_scores(settings):
    config = ModelConfig(**MODEL | HEADS | BFLOAT16 | settings)
    text = lowered("tpu", config)
    assert text.count("splash_mha_fwd") and text.count("splash_mha_dq") and text.count("splash_mha_dkv")
    T = TOKENS_BT.shape[1]
    assert f"{T}x{T}x" not in text
    assert f"{T}x{T}x" in lowered("tpu", dataclasses.replace(config, attention="reference"))


@pytest.mark.full
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_with_remat_heads_the_kernel_is_not_called_again(platform, scan_layers, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda needed: False)
    forward = {"tpu": "splash_mha_fwd", "gpu": "@__cudnn$fmhaSoftmax("}[platform]
    config = ModelConfig(**MODEL | HEADS | BFLOAT16, head_dim=8, scan_layers=scan_layers)
    texts = {remat: lowered(platform, dataclasses.replace(config, remat=remat)) for remat in ("full", "heads")}
    assert {remat: text.count(forward) for remat, text in texts.items()} == {"full": 2, "heads": 1}


@pytest.mark.full
def test_programs_for_tpus_and_gpus_with_documents():
    """Splash has their ids; for GPUs the formula takes the place of cuDNN, unless that is asked for by name."""
    config = ModelConfig(**MODEL | HEADS | BFLOAT16, head_dim=8)
    segments_BT = np.arange(TOKENS_BT.shape[1]) // 50 + np.zeros_like(TOKENS_BT)
    text = lowered("tpu", config, segments_BT=segments_BT)
    assert text.count("splash_mha_fwd_segmented") and text.count("splash_mha_dkv_segmented")
    assert "cudnn" not in lowered("gpu", config, segments_BT=segments_BT)
    with pytest.raises(fd.UserError, match=r'"cudnn" has no documents .* use model.attention = "auto"'):
        lowered("gpu", dataclasses.replace(config, attention="cudnn"), segments_BT=segments_BT)


@pytest.mark.short("9")
@pytest.mark.parametrize("window", [None, 9])
def test_a_program_for_gpus_holds_the_kernel_and_no_scores(window, monkeypatch):
    # JAX asks the installed cuDNN for its version, which is not installed here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_100)
    config = ModelConfig(**MODEL | HEADS | BFLOAT16, head_dim=8, window=window)
    text = lowered("gpu", config)
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert text.count(rf"sliding_window_length\22: {window or 0},") == 2
    T = TOKENS_BT.shape[1]
    assert f"{T}x{T}x" not in text
