"""Cases and systems of the training benchmark, and the recipe that all systems follow."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from peakd_ds.model.build import layer_pairs
from peakd_ds.sps import execution_order

SYSTEMS = ("ours_cached", "ours_online", "published_recipe", "hf_trainer", "textbrewer")
BASELINES = SYSTEMS[2:]

# The recipe of all systems: AdamW, linear warm-up and decay; biases and LayerNorms are not decayed.
EPOCHS = 6
BATCH_SIZE = 32
MAX_SEQ_LENGTH = 128
LR = 1e-4
WARMUP_RATIO = 0.1
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
DROPOUT = 0.1
TEMPERATURE, ALPHA, BETA = 10.0, 0.7, 100.0

TEACHER_EPOCHS, TEACHER_LR = 3, 5e-5


@dataclass(frozen=True)
class Case:
    """One comparison: a task, its number of rows, and the shapes of teacher and student."""

    name: str
    task: str
    num_stored_layers: int
    """Stored layers n of the student, which runs 2n."""
    num_train_rows: int | None = None
    """The first rows of the train split that are used; None for all."""
    num_dev_rows: int | None = None
    is_wide: bool = False
    """Whether the teacher is 12 x 768 and both models have random weights: only for speed, never for a score."""
    recipe_steps: int | None = None
    """Steps after which the published recipe stops and is scaled up; None to run all steps."""

    @property
    def data_name(self) -> str:
        """Folder of the rows: the task's name, followed by the number of rows if they are not all."""
        return self.task if self.num_train_rows is None else f"{self.task}_{self.num_train_rows}"

    @property
    def teacher_layers(self) -> int:
        """Depth of the teacher."""
        return 12 if self.is_wide else 6


CASES = {
    case.name: case
    for case in (
        Case("mrpc_n1", "mrpc", 1),
        Case("mrpc_n3", "mrpc", 3),
        Case("sst2_n1", "sst2", 1, num_train_rows=8000),
        Case("sst2_n3", "sst2", 3, num_train_rows=8000),
        # 24 steps an epoch, because the published recipe takes about 14 s a step at width 768 on two cores
        Case("wide_n3", "mrpc", 3, num_train_rows=768, num_dev_rows=64, is_wide=True, recipe_steps=8),
    )
}
STEP_CASE = "wide_n3"
"""The case in which a single step is measured."""


@dataclass(frozen=True)
class Job:
    """What a baseline trains, and the content of the JSON file that it reads."""

    task: str
    """Name of the data folder: the task's, with a suffix if it has fewer rows."""
    data_dir: str
    teacher: str
    """Folder of the fine-tuned classifier."""
    encoder: str
    """Folder of the pretrained encoder that the student starts from."""
    num_stored_layers: int
    pairs: tuple[tuple[int, int], ...]
    """(student layer, teacher layer) pairs of the hidden-state loss, 1-based; 0 is the embeddings."""
    seed: int
    bf16: bool
    """Whether this machine multiplies bf16 matrices natively, by the same test as ours."""
    folder: str
    """Where the best weights are saved."""
    epochs: int = EPOCHS
    max_steps: int | None = None
    """Steps after which the published recipe stops and is scaled up; None for all."""

    @staticmethod
    def read(file: Path) -> "Job":
        """The job in a file that `write` wrote."""
        values = json.loads(file.read_text())
        return Job(**{**values, "pairs": tuple(tuple(pair) for pair in values["pairs"])})

    def write(self, file: Path) -> None:
        """Write the job as JSON."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def pairs_of(case: Case) -> tuple[tuple[int, int], ...]:
    """Layer pairs of the case by `--layer_map skip`."""
    return layer_pairs("skip", len(execution_order(case.num_stored_layers, "sps")), case.teacher_layers)
