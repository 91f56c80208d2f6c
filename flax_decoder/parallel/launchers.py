"""Whether this process is one of several, from the environment that its launcher sets; needs no JAX."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from flax_decoder.config import DistributedConfig

# Environment variables in which a launcher tells each process the number of processes, and its own.
LAUNCHERS = {
    # Set by srun only: a single process in sbatch or salloc must not wait for others.
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def in_a_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several that can find each other without configuration."""
    launched = any(int(environment.get(count, 1)) > 1 for count, _ in LAUNCHERS.values())
    # An indexed Job, such as those of a JobSet.
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    # GKE lists all workers of a TPU pod; elsewhere JAX asks the metadata server of the TPU.
    workers = environment.get("TPU_WORKER_HOSTNAMES")
    return launched or in_kubernetes or (has_tpu() if workers is None else "," in workers)


def has_tpu() -> bool:
    """Whether this machine has TPU chips and libtpu."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def find_job(config: DistributedConfig, environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """The number of processes and the index of this one: from the config, else from the launcher; None if unknown."""
    count, index = config.num_processes, config.process_id
    for count_name, index_name in LAUNCHERS.values():
        if count_name in environment and index_name in environment:
            count = int(environment[count_name]) if count is None else count
            index = int(environment[index_name]) if index is None else index
    return count, index
