#!/usr/bin/env bash
# One run on a Slurm cluster:  sbatch [sbatch options] slurm/distill.sh --run_dir RUN [train.py options]
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/distill.sh --task rte --teacher bert-base-uncased \
#       --run_dir /shared/runs/rte
#
# One task is one rank: give as many --ntasks-per-node as GPUs; without it there is one on each node. --cpus-per-task
# gives each its cores; without it Slurm may give one, which is slow where there is no GPU. Submit from the
# repository's root; slurm/site.sh says what the cluster is like. Stopped before its time limit, preempted or broken, the
# job saves, is requeued and goes on; peakd_ds/cluster/job.py decides that. sbatch's own options win over these:
#SBATCH --job-name=peakd
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail
PEAKD_SCRIPT=distill.sh
[ -f slurm/common.sh ] || { echo "distill.sh: error: not in the repository's root; sbatch --chdir=ROOT" >&2; exit 2; }
. slurm/common.sh
need_slurm
load_site

PEAKD_START_DIR=$("${PYTHON[@]}" -m peakd_ds.cluster.job open "$@")
export PEAKD_START_DIR
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST; ranks write to" \
    "$PEAKD_START_DIR/HOST.log"

# Signals for the batch script alone (--signal=B:USR1@300) are passed on to the ranks; bash acts on them in `wait`.
# An array's element is ARRAY_INDEX: the number of its last one is that of the whole array too.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
trap 'scancel --signal=USR1 "$job"' USR1
trap : TERM
run() { # in the background, and wait for its end however often a signal interrupts the waiting
    "$@" 2>> "$PEAKD_START_DIR/srun.log" &
    local pid=$! watch status=0
    "${PYTHON[@]}" -m peakd_ds.cluster.job watch "$PEAKD_START_DIR" "$pid" &
    watch=$!
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || :; done
    wait "$pid" || status=$?
    kill "$watch" 2> /dev/null || :
    return "$status"
}
judge() { exec "${PYTHON[@]}" -m peakd_ds.cluster.job close "$PEAKD_START_DIR"; }

if [ "${PEAKD_PREFLIGHT:-yes}" = yes ]; then
    run slurm/preflight.sh "$@" || judge
fi
run srun --kill-on-bad-exit=1 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --label \
    --open-mode=append --output="$PEAKD_START_DIR/%N.log" "${PYTHON[@]}" -m peakd_ds "$@" || :
judge
