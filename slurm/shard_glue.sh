#!/usr/bin/env bash
# Make a task's 64 tokenised shards:  sbatch [sbatch options] slurm/shard_glue.sh --shard_dir SHARDS [peakd-shard options]
#
#   sbatch --nodes=2 --ntasks-per-node=8 slurm/shard_glue.sh --task mnli --teacher bert-base-uncased \
#       --shard_dir /shared/shards/mnli
#
# One task is one MPI worker, at most one a shard; their number does not change the shards. Each node's are copied to its
# scratch too, if it has one. Then:  slurm/distill.sh --data_placement sharded --shard_dir /shared/shards/mnli ...
# Cut off, the same command goes on. Options on sbatch's command line win over these:
#SBATCH --job-name=shard
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
set -euo pipefail
PEAKD_SCRIPT=shard_glue.sh
[ -f slurm/common.sh ] || { echo "shard_glue.sh: error: not in the repository's root; sbatch --chdir=ROOT" >&2; exit 2; }
. slurm/common.sh
need_slurm
load_site
read -r -a MPIRUN <<< "${PEAKD_MPIRUN:-srun --mpi=pmix --kill-on-bad-exit=1}"
exec "${MPIRUN[@]}" "${PYTHON[@]}" -m peakd_ds.programs.shard "$@"
