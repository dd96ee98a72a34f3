#!/usr/bin/env bash
# A sweep as an array job; each element may use several nodes. This command finds the elements of the grid:
#   peakd-sweep --grid GRID.yaml [train.py options] --submit [sbatch options]
# and runs
#   sbatch --array=0-11 [sbatch options] slurm/sweep.sh GRID.yaml [train.py options]
#
# Each element is a job of its own and runs distill.sh, so these are the sbatch options of distill.sh.
#SBATCH --job-name=peakd
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
PEAKD_SCRIPT=sweep.sh
[ -f slurm/common.sh ] || { echo "sweep.sh: error: not in the repository's root; sbatch --chdir=ROOT" >&2; exit 2; }
. slurm/common.sh
need_slurm
load_site
[ $# -gt 0 ] || die "no grid; use peakd-sweep --grid GRID.yaml --submit"
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || die "not an array job; use peakd-sweep --grid $1 --submit, or give sbatch --array=0-N"

mapfile -d '' -t options < <("${PYTHON[@]}" -m peakd_ds.programs.sweep --options "$SLURM_ARRAY_TASK_ID" --grid "$@")
wait "$!" || exit 2
exec bash slurm/distill.sh "${options[@]}"
