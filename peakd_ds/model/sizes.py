"""How many parameters a model has, in its table of tokens, its layers and the rest.

Sharing layers saves parameters of the layers. The table of a multilingual vocabulary may be many times larger.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import Task
from peakd_ds.families import family_of
from peakd_ds.model.build import build_classifier, student_config, task_head, teacher_config


class Parameters(NamedTuple):
    """Stored parameters; one that is shared counts once."""

    embeddings: int
    """Of the table of input tokens."""
    layers: int
    other: int
    """Positions, norms, pooler, head and projections."""

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        names = ("embeddings", "layers", "other")
        parts = [f"{_short(count)} {name}" for name, count in zip(names, self, strict=True)]
        return f"{self.total:,} parameters ({', '.join(parts)})"


def count_parameters(model: PreTrainedModel, whole: nn.Module | None = None) -> Parameters:
    """The parameters of a model, which may be on the meta device.

    Args:
        whole: A module that holds the model and more, which counts too.
    """
    table, layers = model.get_input_embeddings(), model.base_model.get_submodule(family_of(model.config).layers)
    in_table = {id(parameter): parameter.numel() for parameter in table.parameters()}
    # albert has no list of layers: its layers are the rest of the base model
    in_layers = {id(parameter): parameter.numel() for parameter in layers.parameters() if id(parameter) not in in_table}
    total = sum(parameter.numel() for parameter in (whole or model).parameters())
    num_embeddings, num_layers = sum(in_table.values()), sum(in_layers.values())
    return Parameters(num_embeddings, num_layers, total - num_embeddings - num_layers)


def teacher_and_student_on_meta(
    config: RunConfig, task: Task, teacher: PreTrainedConfig, student_init: PreTrainedConfig
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The models of the distill stage without storage: the teacher and the student."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        student = build_classifier(student_config(config, student_init, task_head(task)))
        return build_classifier(teacher_config(config, task, teacher)), student


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 50_000 else f"{count:,}"
