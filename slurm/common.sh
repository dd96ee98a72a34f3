# Sourced by the scripts of this folder: loads the site's settings and finds Python.
# shellcheck shell=bash

die() {
    echo "$(basename "${PEAKD_SCRIPT:-$0}"): error: $*" >&2
    exit 2
}

# Scripts run from the repository's root: sbatch runs a copy of a script, which does not know the original's folder.
[ -f slurm/common.sh ] || die "not in the repository's root; go there, or give sbatch --chdir=ROOT"

# Export the site file's settings. It may set the keys of site.example.sh.
load_site() {
    local file=${PEAKD_SITE:-slurm/site.sh} key known
    if [ ! -f "$file" ]; then
        [ -z "${PEAKD_SITE:-}" ] || die "PEAKD_SITE $file is no file; make one from slurm/site.example.sh"
        file=/dev/null
    fi
    known=$(sed -nE 's/^#?([A-Z_]+)=.*/\1/p' slurm/site.example.sh)
    while read -r key; do
        grep -qx "$key" <<< "$known" || die "$file: unknown key $key; slurm/site.example.sh has them all"
    done < <(sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=.*/\2/p' "$file")
    set -a
    # shellcheck disable=SC1090
    . "$file"
    set +a
    if [ -n "${PEAKD_MODULES:-}" ]; then
        # shellcheck disable=SC2086
        module load $PEAKD_MODULES
    fi
    if [ -n "${PEAKD_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=$PEAKD_INTERFACE NCCL_SOCKET_IFNAME=$PEAKD_INTERFACE
    fi
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # torch warns about each host without a reverse DNS entry
    # A build must not wait for the lock of another job's build, or of one that was killed.
    if [ -n "${PEAKD_SCRATCH:-}" ]; then
        export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PEAKD_SCRATCH/torch_extensions-${SLURM_JOB_ID:-0}}
    fi
    read -r -a PYTHON <<< "${PEAKD_CONTAINER:-} ${PEAKD_VENV:-.venv}/bin/python"
    [ -n "${PEAKD_CONTAINER:-}" ] || command -v "${PYTHON[0]}" > /dev/null ||
        die "no ${PYTHON[0]}; run make venv, or set PEAKD_VENV in $file"
}

need_slurm() {
    [ -n "${SLURM_JOB_ID:-}" ] || die "not in a Slurm job; submit it: sbatch slurm/$(basename "$0")"
    command -v srun > /dev/null || die "no srun on $(hostname); Slurm's programs must be on PATH in the job"
}
