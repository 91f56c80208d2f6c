#!/bin/bash
# Four nodes of eight GPUs, a process per node: sbatch docs/deploy/slurm.sh, from the repository's root.
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Two minutes before the time is up, every process gets SIGTERM, and the run saves.
#SBATCH --signal=TERM@120
# The job begins anew after a failed node, and continues from the last checkpoint.
#SBATCH --requeue
set -euo pipefail
source .venv/bin/activate

# Without srun, this would be a run of one process.
srun python train.py configs/gpt2_124m.toml --data.path /shared/texts --run.folder /shared/runs/gpt2
