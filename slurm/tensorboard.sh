#!/usr/bin/env bash
# TensorBoard for a run, on this node or on one of a running job:
#
#   slurm/tensorboard.sh RUN [--port=6006] [--bind=127.0.0.1] [--job=JOBID [--node=NODE]]
#
# Prints the ssh command that forwards the page to your own machine. TensorBoard listens on the loopback address, which
# only users of that node can reach; --bind=0.0.0.0 shows it to everyone on the network, without a password.
set -euo pipefail
PEAKD_SCRIPT=tensorboard.sh
[ -f slurm/common.sh ] || { echo "tensorboard.sh: error: not in the repository's root" >&2; exit 2; }
. slurm/common.sh
load_site

run=${1:-} port=6006 bind=127.0.0.1 job='' node=''
[ -n "$run" ] && [ -d "$run" ] || die "'$run' is no run folder; usage: slurm/tensorboard.sh RUN [--port=6006] ..."
for word in "${@:2}"; do
    case $word in
    --port=*) port=${word#*=} ;;
    --bind=*) bind=${word#*=} ;;
    --job=*) job=${word#*=} ;;
    --node=*) node=${word#*=} ;;
    *) die "unknown option $word; use --port= --bind= --job= --node=" ;;
    esac
done
[[ $port =~ ^[0-9]+$ ]] || die "--port=$port is not a number"
[ -z "$node" ] || [ -n "$job" ] || die "--node=$node needs --job=JOBID, a running job of yours on that node"

start=()
host=$(hostname) user=$(id -un)
if [ -n "$job" ]; then
    nodes=$(squeue --noheader --jobs="$job" --states=RUNNING --format=%N) || die "job $job is not known to Slurm"
    [ -n "$nodes" ] || die "job $job is not running; leave out --job to run TensorBoard here"
    host=${node:-$(scontrol show hostnames "$nodes" | head -n 1)}
    start=(srun --overlap "--jobid=$job" --nodes=1 --ntasks=1 "--nodelist=$host")
fi
echo "on your own machine:  ssh -N -L $port:localhost:$port $user@$host"
echo "(or through a login node: ssh -N -L $port:localhost:$port -J $user@LOGIN $user@$host),"
echo "then open http://localhost:$port; Ctrl-C here ends it"
exec "${start[@]}" "${PYTHON[@]}" -m tensorboard.main --logdir "$run/tb" --port "$port" --host "$bind"
