"""Keeps JAX from starting the TPU runtime where it is installed, as for `plan`, but there is no TPU."""

import importlib.metadata
import importlib.util
import os
import sys
from glob import glob

# Attached chips, as JAX looks for them too, and the files through which containers reach theirs.
_PCI_VENDORS, _GOOGLE = "/sys/bus/pci/devices/*/vendor", "0x1ae0"
_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/*")


def skip_missing_tpu() -> None:
    """Makes JAX use the CPU at once where it would after trying a TPU, which prints errors of libtpu.

    Nothing changes where JAX_PLATFORMS says what to use, where a TPU may be, or where another plugin of JAX, as that of
    CUDA, is installed.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None or _may_be_used():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")
    if jax is not None and not jax.config.jax_platforms:  # it has read the environment already
        jax.config.update("jax_platforms", "cpu")


def _may_be_used() -> bool:
    """Whether there may be a TPU, or another device than the CPU."""
    told = {name for name in os.environ if name.startswith(("TPU_", "JAX_FORCE_TPU_INIT"))}
    # JAX itself sets the first one when it finds no chip, and libtpu the other one.
    is_asked = bool(told - {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"})
    has_plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    return is_asked or bool(has_plugins) or any(map(glob, _DEVICE_FILES)) or _has_chip()


def _has_chip() -> bool:
    for path in glob(_PCI_VENDORS):
        with open(path, encoding="ascii") as file:
            if file.read().strip() == _GOOGLE:
                return True
    return False
