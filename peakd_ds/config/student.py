"""Settings of the student."""

from dataclasses import dataclass, replace

from peakd_ds.config.setting import Range, setting, whole_number

LAYERS = Range(1, 10_000)


def _parse_layers(text: str) -> tuple[int, ...]:
    return tuple(whole_number(word) for word in text.replace(" ", "").split(","))


@dataclass(frozen=True)
class StudentSettings:
    """The small model: its layers, their first weights and the order in which they run."""

    student_init: str = setting(
        "",
        "folder or hub id of the pretrained encoder whose embeddings and layers start the student, of any family that "
        "learns (docs/families.md); family, tokenizer and sizes may differ from the teacher's",
        shown_default="the --teacher weights as given",
    )
    num_hidden_layers: int = setting(
        3,
        "stored layers n of the student; sps runs them twice (of 6 only the upper three)",
        unit="layers",
        range=LAYERS,
    )
    init_layers: tuple[int, ...] | None = setting(
        None,
        "1-based layers of --student_init that start the student, e.g. 1,3,5",
        unit="layer numbers",
        parse=_parse_layers,
        range=replace(LAYERS, each="n numbers"),
        shown_default="1..n",
    )
    sharing: str = setting(
        "sps",
        "order in which the n stored layers run: none 1..n; sps, cycle 1..n, 1..n; cycle_rev 1..n, n..1; sequence 1, "
        "1, 2, 2, ..; of 6 only 4..6 run again",
        choices=("none", "sps", "cycle", "cycle_rev", "sequence"),
    )
    shuffle_qk: bool | None = setting(
        None, "exchange query and key in a layer's second run", shown_default="on for sps, off for the others"
    )

    @property
    def swaps_qk(self) -> bool:
        """Whether a layer's second run has query and key exchanged."""
        return self.sharing == "sps" if self.shuffle_qk is None else self.shuffle_qk
