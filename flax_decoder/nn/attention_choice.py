"""Which implementation of attention computes a model on which devices."""

import dataclasses

import jax

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError

# What `model.attention = "auto"` takes on each kind of device, where it knows the model's settings.
FASTEST = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}


def target_platform() -> str:
    """Where a program that is being traced will run: "cpu", "gpu" or "tpu".

    The mesh says it, where there is one: a program that is compiled ahead of time is for other devices than these.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = getattr(device, "platform", device) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def choose_kernel(config: ModelConfig) -> str:
    """The implementation that `config.attention` stands for on the devices a program is traced for.

    Returns:
        "reference", "blockwise", "cudnn" or "splash".

    Raises:
        UserError: the one that is asked for by name does not run on these devices.
    """
    platform = target_platform()
    name = FASTEST.get(platform, "reference") if config.attention == "auto" else config.attention
    obstacle = config.attention_obstacle(name) or _device_obstacle(name, platform, config.head_width)
    if config.attention != "auto":
        if obstacle is not None:
            raise UserError(f'model.attention = "{name}" {obstacle}; use model.attention = "auto"')
        return name
    # The compiler cannot split a kernel of Pallas over devices; without a mesh, nobody knows whether it will have to.
    may_be_split = jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1
    return "reference" if obstacle is not None or (name == "splash" and may_be_split) else name


def for_these_devices(config: ModelConfig) -> ModelConfig:
    """The same model, with `auto` in place of an implementation of attention that runs on other devices only."""
    try:
        choose_kernel(config)
    except UserError:
        return dataclasses.replace(config, attention="auto")
    return config


def _device_obstacle(name: str, platform: str, head_width: int) -> str | None:
    """Why an implementation does not run on a kind of device, None where it does."""
    if name == "splash" and platform not in ("tpu", "cpu"):
        return f"is a kernel for TPUs (CPUs interpret it, slowly), not for this {platform}"
    if name != "cudnn":
        return None
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this runs on {platform}"
    # Ahead of time the GPU is not at hand, and JAX takes it for an Ampere.
    capability = jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else "8.0"
    generation = float(capability) if capability.replace(".", "").isdigit() else 0.0
    if generation < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, not {capability}"
    widest = 256 if generation >= 9 else 128
    if head_width > widest:
        return (
            f"knows heads up to {widest} wide on a GPU of compute capability {capability}, not head_dim = {head_width}"
        )
    return None
