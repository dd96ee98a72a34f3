#!/usr/bin/env bash
# Inspect every node of a job: GPUs, disks, clock, limits, and an all-reduce over all ranks. distill.sh runs this before
# training; alone:  sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/preflight.sh [train.py options]
#SBATCH --job-name=preflight
#SBATCH --output=%x-%j.out
set -euo pipefail
PEAKD_SCRIPT=preflight.sh
[ -f slurm/common.sh ] || { echo "preflight.sh: error: not in the repository's root; sbatch --chdir=ROOT" >&2; exit 2; }
. slurm/common.sh
need_slurm
load_site
exec srun --kill-on-bad-exit=1 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${PYTHON[@]}" -m peakd_ds.cluster.preflight "$@"
