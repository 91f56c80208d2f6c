"""Whether this process is one of several, by what its launcher tells it; JAX is not needed to know."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from flax_decoder.config import DistributedConfig

# What a launcher tells each process it starts: how many there are, and which one this is.
LAUNCHERS = {
    # Set by srun alone: within sbatch or salloc, a lone process must not wait for others.
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def in_a_job(environment: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several that can find each other by themselves."""
    launched = any(int(environment.get(count, 1)) > 1 for count, _ in LAUNCHERS.values())
    # Kubernetes numbers the pods of an indexed job, as those of a JobSet are.
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    # The names of all workers of a TPU pod, where Kubernetes made it; a TPU machine of another kind must be asked.
    workers = environment.get("TPU_WORKER_HOSTNAMES")
    return launched or in_kubernetes or (has_tpu() if workers is None else "," in workers)


def has_tpu() -> bool:
    """Whether this machine has TPU chips and what drives them."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def find_job(config: DistributedConfig, environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """How many processes there are and which one this is: as configured, else as the launcher says; None unknown."""
    count, index = config.num_processes, config.process_id
    for count_name, index_name in LAUNCHERS.values():
        if count_name in environment and index_name in environment:
            count = int(environment[count_name]) if count is None else count
            index = int(environment[index_name]) if index is None else index
    return count, index
