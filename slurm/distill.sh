#!/usr/bin/env bash
# One run on a Slurm cluster:  sbatch [sbatch options] slurm/distill.sh --run_dir RUN [train.py options]
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/distill.sh --task rte --teacher bert-base-uncased \
#       --run_dir /shared/runs/rte
#
# One task is one rank: set --ntasks-per-node to the number of GPUs per node; the default is one rank per node. Set
# --cpus-per-task too: Slurm may give a rank only one core, which is slow without a GPU. Submit from the repository's
# root; slurm/site.sh describes the cluster. Before its time limit, when preempted, or after a fault, the job saves what
# it can, is requeued and goes on; peakd_ds/cluster/job.py decides that. sbatch's own options win over these:
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

# A signal to the batch script alone (--signal=B:USR1@300) is passed on to the ranks; bash handles it during `wait`.
# An array's element is named ARRAY_INDEX, since its last element has the job number of the array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
trap 'scancel --signal=USR1 "$job"' USR1
trap : TERM
run() { # in the background, so that signals are handled; wait again after each one
    "$@" 2>> "$PEAKD_START_DIR/srun.log" &
    local pid=$! watch status=0
    "${PYTHON[@]}" -m peakd_ds.cluster.job watch "$PEAKD_START_DIR" "$pid" &
    watch=$!
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || :; done
    wait "$pid" || status=$?
    kill "$watch" 2> /dev/null || :
    return "$status"
}
finish() { exec "${PYTHON[@]}" -m peakd_ds.cluster.job close "$PEAKD_START_DIR"; }

if [ "${PEAKD_PREFLIGHT:-yes}" = yes ]; then
    run slurm/preflight.sh "$@" || finish
fi
# In a file name for srun, %% stands for the character %; `open` refuses a backslash, which has no such form.
run srun --kill-on-bad-exit=1 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --label \
    --open-mode=append --output="${PEAKD_START_DIR//%/%%}/%N.log" "${PYTHON[@]}" -m peakd_ds "$@" || :
finish
