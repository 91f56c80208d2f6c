"""The kind of device that a program is traced for."""

import jax


def target_platform() -> str:
    """The platform that a program is traced for: "cpu", "gpu" or "tpu".

    That of the mesh, if there is one: a program that is compiled ahead of time may be for other devices than these.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = getattr(device, "platform", device) or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
