import pytest

from flax_decoder.config import DistributedConfig
from flax_decoder.parallel import launchers


@pytest.mark.parametrize(
    ("environment", "is_job", "found"),
    [
        ({}, False, (None, None)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, True, (4, 3)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False, (1, 0)),
        # In a batch script, outside srun: one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, (None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True, (2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, (None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False, (None, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True, (None, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, (None, None)),
    ],
)
def test_launchers(monkeypatch, environment, is_job, found):
    monkeypatch.setattr(launchers, "has_tpu", lambda: False)
    assert launchers.in_a_job(environment) == is_job
    assert launchers.find_job(DistributedConfig(), environment) == found
    # The config has priority.
    assert launchers.find_job(DistributedConfig(num_processes=8, process_id=7), environment) == (8, 7)


def test_a_tpu_machine_is_part_of_a_job_unless_its_workers_are_listed(monkeypatch):
    monkeypatch.setattr(launchers, "has_tpu", lambda: True)
    assert launchers.in_a_job({})
    assert not launchers.in_a_job({"TPU_WORKER_HOSTNAMES": "localhost"})
