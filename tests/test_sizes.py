"""Parameters of a model: its table of tokens, its layers and the rest."""

import pytest
import torch
from tiny_families import config_of, head_of, tokenizer_of
from transformers import AutoModelForSequenceClassification

from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import get_task
from peakd_ds.families import FAMILIES, STUDENTS
from peakd_ds.model.sizes import Parameters, count_parameters, teacher_and_student_on_meta


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_of_every_family(model_type: str) -> None:
    config = config_of(model_type, tokenizer_of(model_type), head_of("a", "b"))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    counted = count_parameters(model)
    assert counted.embeddings == config.vocab_size * getattr(config, "embedding_size", 32)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < counted.layers < counted.total - counted.embeddings


@pytest.mark.parametrize("model_type", STUDENTS)
def test_a_shared_layer_counts_once(model_type: str) -> None:
    config = config_of(model_type, tokenizer_of(model_type))
    run = RunConfig(num_hidden_layers=2, sharing="sps")
    teacher, student = map(count_parameters, teacher_and_student_on_meta(run, get_task("sst2"), config, config))
    assert student.embeddings == teacher.embeddings
    norm = 32 if model_type == "modernbert" else 0  # its first layer has no LayerNorm, the layer that runs again has
    assert abs(2 * student.layers - teacher.layers) <= 3 * norm


def test_sizes_are_said_in_millions() -> None:
    text = str(Parameters(11_720_448, 5_323_392, 2_000))
    assert text == "17,045,840 parameters (11.7 M embeddings, 5.3 M layers, 2,000 other)"
