"""`python -m peakd_ds` and `peakd-train`: train.py, which listens to signals before its imports, which take seconds."""

from functools import partial

from peakd_ds import command_line
from peakd_ds.ranks import notes, signals


def main() -> None:
    """Start train.py."""
    signals.listen()
    command_line.start("peakd_ds.train:run_rank", "train.py", on_refusal=partial(notes.note, "refused"))


if __name__ == "__main__":
    main()
