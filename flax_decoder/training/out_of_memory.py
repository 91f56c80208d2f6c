"""What to say, and what to change, where memory does not suffice."""

import re

import jax

from flax_decoder.config import Config
from flax_decoder.training.placement import device_bytes

# What stands before the size in the messages of XLA on CPU, of XLA on GPUs and NumPy, and of XLA's compiler for TPUs.
_BEFORE_A_SIZE = ("allocating", "allocate", "HLO temporaries", "Used")
# More does not make products faster, and has few logits.
CHUNK_TOKENS = 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or JAX says that there is too little memory, on a device or the machine."""
    return isinstance(error, MemoryError) or bool(re.search("RESOURCE_EXHAUSTED|OUT_OF_MEMORY", str(error)))


def size_after(words: str, message: str) -> int | None:
    """The bytes that a message names right after some words, as in "Used 2.50G of"; None if it names none."""
    found = re.search(rf"{words} \(?([\d.]+) ?([KMGT]?)", message)
    return None if found is None else round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def describe_shortage(error: BaseException) -> str:
    """What was asked for at once, as far as the error says it, and what there is."""
    asked = next((size for words in _BEFORE_A_SIZE if (size := size_after(words, str(error))) is not None), None)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    owner = f"a {device.device_kind}" if stats else "this machine"
    in_use = f", of which {stats['bytes_in_use'] / 1e9:,.1f} are in use" if "bytes_in_use" in stats else ""
    amount = "more" if asked is None else f"{asked / 1e9:,.1f} GB"
    return f"out of memory: {amount} were asked for at once, and {owner} has {device_bytes(1) / 1e9:,.1f} GB{in_use}"


def smaller_settings(config: Config, num_devices: int) -> list[str]:
    """Arguments with which a training step takes less memory, the first to try first."""
    model, training = config.model, config.training
    rows, parts = training.rows_per_device, 2 * training.accumulation_steps
    found = []
    if rows is not None:
        found += [f"--training.rows-per-device {rows // 2} (the same result)"] if rows > 1 else []
    elif training.batch_size % parts == 0:
        found.append(f"--training.accumulation-steps {parts} (the same result)")
    elif training.batch_size > 1:
        found.append(f"--training.batch-size {training.batch_size // 2}")
    if model.remat != "full":
        found.append(f"--model.remat {'full' if model.remat in ('dots', 'heads') else 'dots'}")
    if not 0 < (training.loss_chunk_tokens or 0) <= CHUNK_TOKENS:
        found.append(f"--training.loss-chunk-tokens {CHUNK_TOKENS}")
    if model.dtype != "bfloat16":
        found.append("--model.dtype bfloat16")
    if num_devices > config.mesh.fsdp > 0:
        found.append("--mesh.fsdp -1")
    return [*found, "a smaller model"]
