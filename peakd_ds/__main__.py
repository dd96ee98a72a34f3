"""`python -m peakd_ds`: train.py, ready for signals before its imports, which take seconds. For slurm/distill.sh."""

from peakd_ds import preempt

preempt.listen()

from peakd_ds.train import cli  # noqa: E402

cli()
