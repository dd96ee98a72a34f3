#!/usr/bin/env bash
# The first process of a test cluster's host, which is a set of namespaces (network, host name, processes, mounts).
#
#   host.sh head    makes the bridge, starts munged and slurmctld, then its nodes; obeys lines from $CLUSTER_DIR/ctl:
#                   boot NODE | link NODE up|down
#   host.sh node K  waits for its network cable, starts slurmd
#
# When it is killed, the kernel kills every process of the host, and with the head all nodes. The bridge stands in the
# head's own network namespace, so the machine's network is never touched. slurm_cluster.py calls this; settings come in
# CLUSTER_DIR, NUM_NODES, NET and SLURM_CONF.
set -euo pipefail
SELF=$(readlink -f "$0")

boot() { # NODE: new namespaces for it, and its cable to the bridge
    local number=${1#node} init
    ip link del "v$number" 2> /dev/null || :
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc --propagation private \
        "$SELF" node "$number" < /dev/null >> "$CLUSTER_DIR/log/$1.log" 2>&1 3>&- 4>&- &
    echo $! > "$CLUSTER_DIR/$1.pid"
    for _ in $(seq 500); do
        init=$(pgrep -P $!) && break
        sleep 0.01
    done
    ip link add "v$number" type veth peer name eth0 netns "$init"
    ip link set "v$number" up master br0
}

link() { ip link set "v${1#node}" "$2"; }

case $1 in
head)
    exec 3<> "$CLUSTER_DIR/ctl" 4<> "$CLUSTER_DIR/reply"
    hostname head
    mount --bind "$CLUSTER_DIR/hosts" /etc/hosts
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$NET.1/24" dev br0
    ip link set br0 up
    munged --force --key-file="$CLUSTER_DIR/munge.key" --socket="$CLUSTER_DIR/munge.sock" --origin="$NET.1" \
        --pid-file="$CLUSTER_DIR/munged.pid" --log-file="$CLUSTER_DIR/log/munged.log" \
        --seed-file="$CLUSTER_DIR/munged.seed" 3>&- 4>&-
    slurmctld 3>&- 4>&-
    for number in $(seq "$NUM_NODES"); do boot "node$number"; done
    while read -r -u 3 order host state; do
        status=0
        case $order in
        boot) boot "$host" || status=$? ;;
        link) link "$host" "$state" || status=$? ;;
        *) status=2 ;;
        esac
        echo "$status" >&4
    done
    ;;
node)
    hostname "node$2"
    mount -t tmpfs tmpfs /dev/shm
    mount --bind "$CLUSTER_DIR/scratch.node$2" "$CLUSTER_DIR/scratch" # one name, another disk on each node
    for _ in $(seq 500); do
        grep -q eth0: /proc/self/net/dev && break
        sleep 0.01
    done
    ip link set lo up
    ip addr add "$NET.$((10 + $2))/24" dev eth0
    ip link set eth0 up
    slurmd -N "node$2"
    while :; do sleep 3600 & wait $! || :; done # collects the host's orphans
    ;;
esac
