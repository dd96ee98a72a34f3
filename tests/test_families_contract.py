"""What is read and checked before anything is built, for every family: each is accepted, each wrong input refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import head_of, save_family
from transformers import AutoModelForSequenceClassification

from peakd_ds.command_line import parse
from peakd_ds.data.tasks import get_task
from peakd_ds.errors import UserError
from peakd_ds.families import FAMILIES, STUDENTS, family_of
from peakd_ds.model import contract
from peakd_ds.model.config_file import Pretrained

TASK = get_task("rte")
HEAD = head_of(*TASK.label_names)
DECODERS = tuple(name for name, family in FAMILIES.items() if family.is_decoder)
OTHERS = tuple(name for name in FAMILIES if name != "bert")
ENCODERS = tuple(name for name in OTHERS if name not in DECODERS)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`family(model_type, is_classifier)` gives a folder that no test may change."""
    folder = tmp_path_factory.mktemp("families")

    def folder_of(model_type: str, is_classifier: bool = False) -> Path:
        target = folder / f"{model_type}_{is_classifier}"
        return target if target.exists() else save_family(target, model_type, HEAD if is_classifier else None)

    return folder_of


def settings_of(teacher: Path, *words: str) -> Any:
    return parse(
        ["--task", "rte", "--teacher", str(teacher), "--run_dir", "unused", "--max_seq_length", "32"]
        + ["--num_hidden_layers", "2", *words]
    )


def read(folder: Path, student: Path | None = None, *words: str) -> Pretrained:
    """The teacher, checked with its student by the functions that a run calls."""
    teacher = contract.find_encoder(str(folder), "teacher")
    student_init = contract.find_encoder(str(student), "student_init") if student else teacher
    tokenizers = contract.load_tokenizers(teacher, student_init)
    contract.check_contract(settings_of(folder, *words), TASK, teacher, student_init, *tokenizers)
    return teacher


def refusal(folder: Path, *more: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, *more)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(folder) in message
    return message


def edited(folder: Path, file: str = "config.json", **entries: Any) -> Path:
    """The folder with entries of a JSON file changed; None deletes one."""
    document = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps({name: value for name, value in document.items() if value is not ...}))
    return folder


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- Accepted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_classifier", [False, True], ids=["encoder", "classifier"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_teaches(family: Callable[..., Path], model_type: str, is_classifier: bool) -> None:
    source = read(family(model_type, is_classifier), family("bert"), "--beta", "0.1")
    assert source.family is FAMILIES[model_type] and source.is_classifier == is_classifier
    assert source.config.num_hidden_layers == 4 and source.config.hidden_size == 32
    assert len(source.weight_names) > 10
    if is_classifier:
        assert tuple(source.config.id2label.values()) == TASK.label_names


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_some_families_learn(family: Callable[..., Path], model_type: str) -> None:
    folder = family(model_type)
    if model_type in STUDENTS:
        assert read(folder).path == str(folder)
        assert read(family("bert"), folder)
        return
    assert f"--teacher {folder} cannot start a student" in refusal(folder)
    with pytest.raises(UserError, match=rf"--student_init {folder} cannot start a student: {model_type}, .* set --stu"):
        read(family("bert"), folder)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_config_is_that_of_transformers(family: Callable[..., Path], model_type: str) -> None:
    from transformers import AutoConfig

    folder = family(model_type, True)
    expected = AutoConfig.from_pretrained(folder).to_dict()
    found = contract.find_encoder(str(folder), "teacher").config.to_dict()
    left_out = {"dtype", "_name_or_path", "transformers_version", "problem_type", "cls_token_id", "sep_token_id"}
    left_out |= {"bos_token_id", "eos_token_id"}
    for name in expected.keys() - left_out:
        assert found.get(name) == expected[name], name


PRETRAINED = {
    "roberta": ("RobertaForMaskedLM", ()),
    "xlm-roberta": ("XLMRobertaForMaskedLM", ()),
    "camembert": ("CamembertForMaskedLM", ()),
    "electra": ("ElectraForPreTraining", ()),
    "distilbert": ("DistilBertForMaskedLM", ()),
    "modernbert": ("ModernBertForMaskedLM", ()),
    "deberta-v2": ("DebertaV2ForMaskedLM", ()),
    "mpnet": ("MPNetForMaskedLM", ()),
    "albert": ("AlbertForPreTraining", ()),
    "qwen2": ("Qwen2ForCausalLM", ()),
    "llama": ("LlamaForCausalLM", ()),
    "gemma": ("GemmaForCausalLM", ()),
}
"""A class that a family's pretrained checkpoints have."""


@pytest.mark.parametrize("model_type", PRETRAINED)
def test_a_head_of_pretraining_is_left_over(tmp_path: Path, family: Callable[..., Path], model_type: str) -> None:
    import transformers
    from transformers import AutoConfig

    folder = save_family(tmp_path / "encoder", model_type)
    config = AutoConfig.from_pretrained(folder)
    getattr(transformers, PRETRAINED[model_type][0])(config).save_pretrained(folder)
    source = read(folder, family("bert"))
    assert not source.is_classifier and source.config.architectures == [PRETRAINED[model_type][0]]


def test_deberta_with_keys_of_its_own_for_positions(tmp_path: Path) -> None:
    assert read(save_family(tmp_path / "own", "deberta-v2", HEAD, share_att_key=False)).is_classifier


@pytest.mark.parametrize("model_type", ["modernbert", "electra"])
def test_older_spelling_of_settings(tmp_path: Path, model_type: str) -> None:
    folder = save_family(tmp_path / "old", model_type, HEAD)
    if model_type == "modernbert":
        edited(folder, layer_types=..., rope_parameters=..., global_rope_theta=10_000.0, global_attn_every_n_layers=2)
        config = read(folder).config
        assert config.layer_types == ["full_attention", "sliding_attention"] * 2
        assert config.rope_parameters["full_attention"]["rope_theta"] == 10_000.0
    else:
        with_weights(folder, lambda weights: {name.replace("LayerNorm.weight", "LayerNorm.gamma"): weight
                                              for name, weight in weights.items()})  # fmt: skip
        assert read(folder).is_classifier


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_gets_the_tokenizer_s_padding(tmp_path: Path, family: Callable[..., Path], model_type: str) -> None:
    folder = edited(save_family(tmp_path / "decoder", model_type, HEAD), pad_token_id=None)
    teacher = contract.find_encoder(str(folder), "teacher")
    tokenizer = contract.load_tokenizer(teacher)
    assert teacher.config.pad_token_id == tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"


# -- Refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_without_padding(tmp_path: Path, model_type: str) -> None:
    folder = edited(save_family(tmp_path / "decoder", model_type, HEAD), pad_token_id=None)
    edited(folder, "tokenizer_config.json", pad_token=None)
    message = refusal(folder)
    assert "causal model without padding token" in message and "set pad_token in its tokenizer_config.json" in message


@pytest.mark.parametrize("option", ["teacher", "student_init", "model"])
def test_a_family_that_is_not_known(tmp_path: Path, option: str) -> None:
    folder = edited(save_family(tmp_path / "unknown", "roberta"), model_type="gpt2")
    with pytest.raises(UserError) as caught:
        contract.find_encoder(str(folder), option)
    message = str(caught.value)
    assert f"--{option} {folder} is a gpt2 model; take one of the model types bert, roberta, " in message
    assert ("--teacher_outputs" in message) == (option == "teacher")
    assert ("llama" in message) == (option != "student_init")


WRONG_SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a size": ("roberta", {"hidden_size": "32"}, "it must be a whole number"),
    "heads": ("electra", {"num_attention_heads": 5}, "not a multiple of its 5 attention heads"),
    "dropout": ("distilbert", {"seq_classif_dropout": 1.0}, "a number from 0 to below 1"),
    "padding": ("modernbert", {"pad_token_id": 10_000}, "but vocab_size"),
    "no padding": ("roberta", {"pad_token_id": None}, "its positions count from it; set the id"),
    "activation": ("mpnet", {"hidden_act": "nonsense"}, "it must be one of"),
    "relative positions": ("roberta", {"position_embedding_type": "relative_key"}, "computes only"),
    "relative positions of electra": ("electra", {"position_embedding_type": "relative_key_query"}, "computes only"),
    "a decoder": ("xlm-roberta", {"is_decoder": True}, "is a decoder by its config.json"),
    "code": ("modernbert", {"auto_map": {"AutoConfig": "evil.Config"}}, "has no such setting"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "has no such setting"),
    "chunks": ("albert", {"chunk_size_feed_forward": 7}, "computes only 0"),
    "kinds of layers": (
        "modernbert",
        {"layer_types": ["full_attention"]},
        "layer_types",
    ),
    "an odd kind of layer": ("qwen2", {"layer_types": ["linear_attention"] * 4}, "it must be a list of full_attention"),
    "shared heads": ("qwen3", {"num_key_value_heads": 3}, "not a multiple of its num_key_value_heads 3"),
    "pooling": ("modernbert", {"classifier_pooling": "max"}, "it must be one of cls, mean"),
    "scores": ("deberta-v2", {"pos_att_type": "c2c"}, "it must be null, or one or both of c2p and p2c"),
    "classes": ("camembert", {"id2label": {"0": "x", "2": "y"}}, "a name of its own for each class number"),
    "layers": ("distilbert", {"n_layers": 3}, "that a distilbert model of 3 layers has not"),
    "more layers": ("gemma", {"num_hidden_layers": 5}, "lacks"),
    "vocabulary": ("mpnet", {"vocab_size": 90}, "of shape [106, 32], but its config.json makes it [90, 32]"),
    "problem": ("roberta", {"problem_type": "regression"}, "heads of that size here"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings(tmp_path: Path, name: str) -> None:
    model_type, entries, words = WRONG_SETTINGS[name]
    assert words in refusal(edited(save_family(tmp_path / "wrong", model_type, HEAD), **entries))


@pytest.mark.parametrize("key", ["to_dict", "__class__", "_attn_implementation", "attn_implementation", "unknown"])
def test_keys_that_no_model_reads_change_nothing(tmp_path: Path, family: Callable[..., Path], key: str) -> None:
    folder = edited(save_family(tmp_path / "odd", "roberta"), **{key: "eager"})
    assert read(folder).config.to_dict() == read(family("roberta")).config.to_dict()


@pytest.mark.parametrize("model_type", OTHERS)
def test_weights_of_a_layer_are_missing(tmp_path: Path, family: Callable[..., Path], model_type: str) -> None:
    folder = save_family(tmp_path / "lacking", model_type)
    last = sorted(name for name in load_file(folder / "model.safetensors") if "layer" in name)[-1]
    message = refusal(with_weights(folder, lambda weights: {n: w for n, w in weights.items() if n != last}))
    assert f"lacks 1 weights, {last} among them; get the complete model" in message


@pytest.mark.parametrize("model_type", OTHERS)
def test_weights_that_are_not_finite_or_of_another_shape(tmp_path: Path, model_type: str) -> None:
    folder = save_family(tmp_path / "model", model_type)
    name = sorted(load_file(folder / "model.safetensors"))[0]
    good = (folder / "model.safetensors").read_bytes()
    assert "NaN, infinite" in refusal(with_weights(folder, lambda weights: weights | {name: weights[name] * torch.nan}))
    (folder / "model.safetensors").write_bytes(good)
    assert "of shape" in refusal(with_weights(folder, lambda weights: weights | {name: torch.zeros(7, 7, 7)}))
    (folder / "model.safetensors").write_bytes(good)
    assert "floating-point" in refusal(with_weights(folder, lambda w: w | {name: w[name].to(torch.int8)}))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_classifier_without_its_head(tmp_path: Path, model_type: str) -> None:
    folder = save_family(tmp_path / "model", model_type, HEAD)
    heads = ("classifier.", "score.")
    with_weights(folder, lambda weights: {n: w for n, w in weights.items() if not n.startswith(heads)})
    message = refusal(folder)
    assert "is a classifier by its config.json, but its weights hold no " in message and "Model to have it" in message


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_that_no_architecture_names(tmp_path: Path, model_type: str) -> None:
    student = save_family(tmp_path / "student", "bert")
    folder = edited(save_family(tmp_path / "model", model_type, HEAD), architectures=["Model"], model_type=model_type)
    assert "ForSequenceClassification; set that if it is a classifier" in refusal(folder, student)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "qwen2"])
@pytest.mark.parametrize("head", [None, HEAD], ids=["encoder", "classifier"])
def test_pickled_weights_can_be_converted(tmp_path: Path, model_type: str, head: dict[str, Any] | None) -> None:
    """The command that the message gives is run here, in this process."""
    folder = save_family(tmp_path / "pickled model", model_type, head)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    command = message.split("python -c ")[1]
    assert command.endswith(f"'{folder}'") and "pytorch_model.bin; write it with: " in message
    exec(command.split("'")[1].replace("sys.argv[1]", repr(str(folder))))
    assert contract.find_encoder(str(folder), "teacher").is_classifier == (head is not None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_that_are_too_long(family: Callable[..., Path], model_type: str) -> None:
    with pytest.raises(UserError, match=r"129 is longer than the 128 positions of .* set at most 128"):
        read(family(model_type), family("bert"), "--max_seq_length", "129")


def test_labels_of_another_task(tmp_path: Path, family: Callable[..., Path]) -> None:
    for name, head in (("one", head_of()), ("three", head_of("a", "b", "c"))):
        folder = save_family(tmp_path / name, "roberta", head)
        assert "take a model of this task" in refusal(folder, family("bert"))


def test_a_tokenizer_of_another_model(tmp_path: Path, family: Callable[..., Path]) -> None:
    folder = save_family(tmp_path / "roberta", "roberta")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((family("qwen2") / file).read_bytes())
    assert "has a tokenizer that does not fit it" in refusal(folder)


def test_tokens_of_different_tokenizers_are_not_compared(family: Callable[..., Path]) -> None:
    words = ("--hidden_loss", "tokens", "--beta", "0.1")
    message = refusal(family("roberta"), family("bert"), *words)
    assert "different tokenizers; set --hidden_loss cls or --beta 0, or take a --student_init" in message
    assert read(family("roberta"), family("bert"), *words[:2], "--beta", "0")


# -- The vector of a row -----------------------------------------------------------------------------------------------


def pooling_of(folder: Path, setting: str = "auto") -> str:
    teacher = contract.find_encoder(str(folder), "teacher")
    return contract.teacher_pooling(setting, teacher, contract.load_tokenizer(teacher))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_natural_pooling(family: Callable[..., Path], model_type: str) -> None:
    folder = family(model_type)
    assert pooling_of(folder) == ("last" if model_type in DECODERS else "cls")
    assert contract.find_encoder(str(folder), "teacher").pooling == pooling_of(folder)
    assert pooling_of(folder, "mean") == "mean" and pooling_of(folder, "last") == "last"
    if model_type in DECODERS:
        with pytest.raises(UserError, match="causal model, whose first token sees no other; set --teacher_pooling las"):
            pooling_of(folder, "cls")
    else:
        assert pooling_of(folder, "cls") == "cls"


def test_pooling_of_a_head_that_reads_all_tokens(tmp_path: Path) -> None:
    assert pooling_of(save_family(tmp_path / "mean", "modernbert", HEAD, classifier_pooling="mean")) == "mean"


def save_pooling(folder: Path, document: Any) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(document))
    return folder


def test_pooling_of_sentence_transformers(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "model", "mpnet")
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    for mode, expected in modes.items():
        save_pooling(folder, {"word_embedding_dimension": 32, "include_prompt": True} | {m: m == mode for m in modes})
        assert pooling_of(folder) == expected and pooling_of(folder, "last") == "last"
    assert pooling_of(save_pooling(folder, {"pooling_mode": "mean"})) == "mean"
    wrong: tuple[Any, ...] = (
        {"pooling_mode_max_tokens": True},
        dict.fromkeys(modes, True),
        {},
        [],
        "x",
        {"pooling_mode": 3},
    )
    for document in wrong:
        save_pooling(folder, document)
        with pytest.raises(UserError, match=r"1_Pooling/config\.json.*set --teacher_pooling cls, last or mean"):
            pooling_of(folder)
        assert pooling_of(folder, "mean") == "mean"


def test_every_family_of_a_config_is_found() -> None:
    from transformers import AutoConfig

    for name in FAMILIES:
        assert family_of(AutoConfig.for_model(name)).model_type == name


@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_a_saved_teacher_keeps_the_pooling_of_its_run(pooling: str, tmp_path: Path) -> None:
    from peakd_ds.results.export import export_model

    folder = save_family(tmp_path / "mpnet", "mpnet", head_of("no", "yes"))
    source = contract.find_encoder(str(folder), "teacher")
    tokenizer = contract.load_tokenizer(source)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    export_model(model, tokenizer, tmp_path / "teacher", "", with_checksums=True, pooling=pooling)
    saved = contract.find_encoder(str(tmp_path / "teacher"), "teacher")
    assert contract.teacher_pooling("auto", saved, tokenizer) == pooling
    assert (tmp_path / "teacher" / "1_Pooling").exists() == (pooling != "cls")
