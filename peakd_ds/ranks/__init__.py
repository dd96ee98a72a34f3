"""Ranks: how they find each other, communicate, notice that one is gone, and end.

Each module imports only ones before it: parents, signals, device, slurm_env, notes, liveness, launch, host, dist,
preempt, outcome. Nothing here imports peakd_ds.cluster.
"""
