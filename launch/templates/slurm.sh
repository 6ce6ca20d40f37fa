#!/bin/bash
# `sbatch` this file: one task a machine starts the ranks of its machine.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node=1
{% if gpus %}
#SBATCH --gpus-per-node={{ gpus }}
{% endif %}
#SBATCH --exclusive
#SBATCH --output=%x-%j.out

srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 \
    tpx launch --slurm {{ shell }}
