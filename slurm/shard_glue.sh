#!/usr/bin/env bash
# Make a task's 64 tokenised shards:  sbatch [sbatch options] slurm/shard_glue.sh --shard_dir SHARDS [peakd-shard options]
#
#   sbatch --nodes=2 --ntasks-per-node=8 slurm/shard_glue.sh --task mnli --teacher bert-base-uncased \
#       --shard_dir /shared/shards/mnli
#
# Rows of your own take the place of the task: --train_file 'rows-*.csv' [--label_column LABEL ...].
# With --student_init, as for distill.sh, of an encoder with another tokenizer, the shards hold the tokens of both.
#
# One task is one MPI worker, at most one per shard; the number of workers does not change the shards. If nodes have a
# scratch disk, each node's shards are copied to it. Then:
#
#   sbatch slurm/distill.sh --data_placement sharded --shard_dir /shared/shards/mnli ...
#
# After an interruption, the same command makes the missing shards. sbatch's own options win over these:
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
