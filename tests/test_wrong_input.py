"""What a user can get wrong: one clear line with value, rule and remedy, before any engine, with nothing touched."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, VOCABULARY, made_up_rows, save_encoder, write_split
from safetensors.torch import load_file, save_file

from peakd_ds import __main__, stages, train
from peakd_ds.command_line import parse
from peakd_ds.engine import checkpoint
from peakd_ds.errors import UserError
from peakd_ds.ranks import dist
from peakd_ds.results import trim
from peakd_ds.run import open_run

# Words by which a message tells what to do.
REMEDY = re.compile(
    r"\b(set|take|give|get|use|choose|add|write|lower|fix|save|free|leave|go online|start|did you mean|"
    r"the default is|the settings it was started with|help lists all)\b"
)

Snapshot = dict[str, bytes | None]


def snapshot(folder: Path) -> Snapshot:
    """Content of every file below a folder, by name; None for folders and for a folder that is not there."""
    if not folder.exists():
        return {"": None}
    paths = [path for path in folder.rglob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


class Program:
    """The words of a good command line, to be changed in one place."""

    def __init__(self, folder: Path, teacher: Path, data_dir: Path):
        self.run_dir, self.new_dir = folder / "run", folder / "new"
        (self.run_dir / "notes").mkdir(parents=True)
        (self.run_dir / "notes" / "mine.bin").write_bytes(b"precious")
        self.settings = {
            "task": "rte",
            "teacher": str(teacher),
            "data_dir": str(data_dir),
            "num_hidden_layers": "2",
            "max_seq_length": "32",
            "dtype": "fp32",
        }

    def words(self, run_dir: Path, *more: str, **changes: str | Path) -> list[str]:
        settings = {**self.settings, "run_dir": run_dir, **changes}
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + list(more)

    def refuses(self, *more: str, **changes: str | Path) -> str:
        """The message, the same for a folder that holds things and a new one, both left as they were."""
        messages = []
        for run_dir in (self.new_dir, self.run_dir):
            before = snapshot(run_dir)
            with pytest.raises(UserError) as caught:
                open_run(parse(self.words(run_dir, *more, **changes)))
            assert snapshot(run_dir) == before
            messages.append(str(caught.value).replace(str(run_dir), "RUN"))
        assert messages[0] == messages[1]
        assert "\n" not in messages[0] and messages[0].isascii()
        assert REMEDY.search(messages[0]), f"no remedy in: {messages[0]}"
        return messages[0]


@pytest.fixture
def program(tiny_encoder: Path, tiny_data: Path, tmp_path: Path, single_rank: None) -> Program:
    return Program(tmp_path, tiny_encoder, tiny_data)


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message


def test_good_input_is_taken(program: Program) -> None:
    """Otherwise the tests below would see refusals for another reason."""
    before = snapshot(program.run_dir)
    run = open_run(parse(program.words(program.run_dir)))
    assert run.pairs == ((1, 1), (2, 2), (3, 3))
    assert snapshot(program.run_dir).items() >= before.items()
    assert open_run(parse(program.words(program.new_dir, "--dry_run"))).task.name == "rte"
    assert not program.new_dir.exists(), "a dry run writes nothing"


# -- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--task rtee", ["unknown task 'rtee'; use one of cola, sst2", "closest: rte"]),
        ("--temprature 3", ["unknown option --temprature", "did you mean --temperature?"]),
        ("--temperature 0", ["--temperature 0.0", "[0.01, 1000]", "the default is 10.0"]),
        ("--temperature=-2", ["--temperature -2.0", "[0.01, 1000]"]),
        ("--temperature nan", ["'nan' is not a finite number", "[0.01, 1000]"]),
        ("--alpha 1.5", ["--alpha 1.5", "[0, 1]", "the default is 0.7"]),
        ("--alpha=-0.1", ["--alpha -0.1", "[0, 1]"]),
        ("--beta=-1", ["--beta -1.0", "[0, 1000000]", "the default is 100.0"]),
        ("--layer_map 1:2,9:1", ["pair 9:1 is out of range", "student runs layers 1 to 4", "teacher 1 to 4", "choose"]),
        ("--layer_map 1:5", ["pair 1:5 is out of range"]),
        ("--layer_map 0:1", ["pair 0:1 is out of range"]),
        ("--num_hidden_layers 3 --layer_map last", ["the teacher has 4 layers and the student runs 6; use skip or a"]),
        ("--num_hidden_layers 5", ["layer 5 of --teacher ", "but it has 4; lower --num_hidden_layers or set --init"]),
        ("--init_layers 1,9", ["layer 9 of --teacher ", "but it has 4"]),
        ("--max_seq_length 129", ["129 is longer than the 128 positions of --teacher ", "set at most 128"]),
        (
            "--stages distill",
            ["--stages distill needs a trained teacher", "add the teacher stage, or give a classifier"],
        ),
        ("--stages ptp", ["--stages ptp needs a trained teacher"]),
        ("--teacher_ds_config zero1_fp32", ["zero1_fp32 has ZeRO stage 1", "take stage 0 (replicated) or 3 (sharded)"]),
        ("--teacher_ds_config zero2_bf16", ["zero2_bf16 has ZeRO stage 2", "a frozen teacher has neither"]),
        (
            "--dtype bf16 --student_ds_config zero1_fp32",
            ["--dtype bf16 does not fit", "which is fp32; set --dtype fp32"],
        ),
        (
            "--dtype fp32 --student_ds_config zero2_bf16",
            ["--dtype fp32 does not fit", "which is bf16; set --dtype bf16"],
        ),
        (
            "--dtype fp32 --teacher_ds_config zero3_bf16",
            ["zero3_bf16 enables bf16, but the run is in fp32", "set --dtype"],
        ),
        ("--student_ds_config zero9", ["--student_ds_config zero9 is neither a file nor one of", "zero1_fp32"]),
        ("--teacher_ds_config no/such.json", ["--teacher_ds_config no/such.json is neither a file nor"]),
    ],
)
def test_setting(program: Program, words: str, parts: list[str]) -> None:
    assert_says(program.refuses(*words.split()), *parts)


def test_fp16_at_stage_0(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"fp16": {"enabled": true}}')
    message = program.refuses("--student_ds_config", str(file), dtype="auto")
    assert_says(message, f"--student_ds_config {file} trains in fp16 at ZeRO stage 0", "take zero1_fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs where there is a GPU")
@pytest.mark.parametrize("words", ["--dtype fp16", "--dtype auto --student_ds_config zero1_fp16"])
def test_fp16_without_a_gpu(program: Program, words: str) -> None:
    assert_says(program.refuses(*words.split()), "fp16 needs a GPU: ", "set --dtype bf16 or fp32")


@pytest.mark.parametrize("text", ["temprature: 3", "learning-rate: 1", "lr: [", "ptp: maybe"])
def test_yaml(program: Program, tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    message = program.refuses("--config", str(tmp_path / "settings.yaml"))
    assert_says(message, f"--config {tmp_path / 'settings.yaml'}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"train_batch_size": 32}', ["sets train_batch_size, which follows from the run's own settings; take it out"]),
        ('{"gradient_accumulation_steps": 2, "zero_optimization": {}}', ["sets gradient_accumulation_steps"]),
        ('{"optimizer": {"type": "Adam"}}', ["sets optimizer"]),
        ('{"zero_optimization": ', ["is not JSON ("]),
        ("[1]", ["is JSON, but not an object; write it like those in ds_configs/"]),
        ('{"amp": {"enabled": true}}', [": amp has no effect here, or none that is tested; leave it out"]),
        ('{"csv_monitor": 3}', [": csv_monitor is 3, but must be an object; write it like in ds_configs/"]),
    ],
)
@pytest.mark.parametrize("option", ["student_ds_config", "teacher_ds_config"])
def test_deepspeed_config(program: Program, tmp_path: Path, option: str, text: str, parts: list[str]) -> None:
    (tmp_path / "ds.json").write_text(text)
    assert_says(program.refuses(**{option: tmp_path / "ds.json"}), f"--{option} {tmp_path / 'ds.json'}", *parts)


@pytest.mark.parametrize("monitor", ["tensorboard", "csv_monitor"])
def test_monitor_that_cannot_write(program: Program, tmp_path: Path, monitor: str) -> None:
    """Its folder would be made when the first engine starts."""
    (tmp_path / "file").write_text("mine")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({monitor: {"enabled": True, "output_path": f"{tmp_path}/file/logs", "job_name": "me"}}))
    message = program.refuses("--student_ds_config", str(file))
    folder = tmp_path / "file" / "logs" / "me_teacher"
    assert_says(message, f"--student_ds_config {file}: {monitor} cannot write to {folder} ({tmp_path / 'file'} is no")
    for changes in ({"enabled": False}, {"output_path": str(tmp_path / "new")}):
        section = {**json.loads(file.read_text())[monitor], **changes}
        file.write_text(json.dumps({monitor: section}))
        open_run(parse(program.words(program.new_dir, "--dry_run", "--student_ds_config", str(file))))
    assert not (tmp_path / "new").exists(), "only looked at"


def test_global_batch_that_the_ranks_do_not_divide(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    monkeypatch.setattr(dist, "agree", lambda action: action())  # would wait for the other two
    message = program.refuses("--global_batch_size", "32")
    assert_says(message, "--global_batch_size 32 is not a multiple of the 3 ranks; set 30 or 33, or start another")
    assert_says(program.refuses("--global_batch_size", "2"), "2 is not a multiple of the 3 ranks; set 3, or start")


# -- Models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny_teacher: Callable[[str], Path], tmp_path: Path) -> Path:
    """A good classifier for rte, to spoil."""
    return Path(shutil.copytree(tiny_teacher("rte"), tmp_path / "teacher"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_good_teacher_is_taken(program: Program, teacher: Path) -> None:
    assert open_run(parse(program.words(program.new_dir, "--dry_run", teacher=teacher))).teacher.source.is_classifier


def test_teacher_that_is_not_there(program: Program, tmp_path: Path) -> None:
    message = program.refuses(teacher=tmp_path / "nobody")
    assert_says(message, f"--teacher {tmp_path / 'nobody'} is neither a folder with config.json nor a model", "give a")
    assert_says(program.refuses(teacher="no-such/model"), "--teacher no-such/model is neither", "go online")


def test_teacher_without_config(program: Program, teacher: Path) -> None:
    (teacher / "config.json").unlink()
    assert_says(program.refuses(teacher=teacher), f"--teacher {teacher} is neither a folder with config.json nor")


def test_teacher_without_weights(program: Program, teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()
    message = program.refuses(teacher=teacher)
    assert_says(
        message, f"--teacher {teacher} has no weights; the folder must hold model.safetensors", "save the model"
    )


def test_teacher_with_pickled_weights_only(program: Program, teacher: Path) -> None:
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    assert_says(program.refuses(teacher=teacher), "has no weights")


def test_teacher_with_truncated_weights(program: Program, teacher: Path) -> None:
    file = teacher / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert_says(program.refuses(teacher=teacher), f"{file} is not a complete safetensors file (", "get it again")


def test_classifier_without_its_head(program: Program, teacher: Path) -> None:
    """Transformers would make up a random one, and the student would learn from it."""
    weights = load_file(teacher / "model.safetensors")
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
    save_file(body, teacher / "model.safetensors", metadata={"format": "pt"})
    assert_says(program.refuses(teacher=teacher), "is a classifier by its config.json", "no classifier.weight; get")


@pytest.mark.parametrize("option", ["teacher", "student_init"])
def test_a_family_that_is_not_known(program: Program, tmp_path: Path, option: str) -> None:
    other = save_encoder(tmp_path / "gpt2")
    document = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**document, "model_type": "gpt2"}))
    message = program.refuses(**{option: other})
    assert_says(message, f"--{option} {other} is a gpt2 model; take one of the model types bert, roberta")


def test_tokenizer_larger_than_the_teacher_s_vocabulary(program: Program, tmp_path: Path) -> None:
    small = save_encoder(tmp_path / "small", vocab_size=len(VOCABULARY) - 10)
    message = program.refuses(teacher=small)
    assert_says(message, f"tokenizer has {len(VOCABULARY)} entries", f"embeds {len(VOCABULARY) - 10}", str(small))


def test_tokens_of_different_tokenizers_are_not_compared(program: Program, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"film"', '"movie"'))
    message = program.refuses(student_init=other, hidden_loss="tokens", beta="0.1")
    assert_says(message, "--hidden_loss tokens", f"--teacher {program.settings['teacher']}", "different tokenizers")
    assert_says(message, f"--student_init {other}", "set --hidden_loss cls")


def test_student_encoder_too_small_for_the_teacher_s_tokenizer(program: Program, tmp_path: Path) -> None:
    """It has no tokenizer of its own, so it takes the teacher's."""
    small = save_encoder(tmp_path / "small", vocab_size=len(VOCABULARY) - 10)
    for file in (*small.glob("tokenizer*"), small / "vocab.txt"):
        file.unlink()
    message = program.refuses(student_init=small)
    assert_says(message, f"the tokenizer has {len(VOCABULARY)} entries", f"--student_init {small} embeds", "save there")


def test_teacher_without_a_tokenizer(program: Program, teacher: Path) -> None:
    """Transformers makes up a tokenizer of five words, to which every other word is unknown."""
    for file in (*teacher.glob("tokenizer*"), teacher / "vocab.txt"):
        file.unlink()
    message = program.refuses(teacher=teacher)
    assert_says(message, f"--teacher {teacher} has no tokenizer that can be read", "save it there with save_pretrained")


def test_a_tokenizer_that_cannot_be_trimmed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "KINDS", ("BPE",))
    assert_says(program.refuses("--trim_vocabulary"), "knows tokenizers of BPE, not of WordPiece", "leave")


def test_other_labels(program: Program, teacher: Path) -> None:
    names = ["not_entailment", "contradiction"]
    change_config(teacher, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    message = program.refuses(teacher=teacher)
    assert_says(message, f"--teacher {teacher} has the labels ['not_entailment', 'contradiction'], task rte has")
    assert_says(message, "['entailment', 'not_entailment']; take a model of this task, whatever its order")


def test_teacher_of_another_task(program: Program, tiny_teacher: Callable[[str], Path]) -> None:
    for task, teacher_task, part in (
        ("rte", "mnli", "has the labels ['entailment', 'neutral', 'contradiction'], task rte"),
        ("rte", "sst2", "has the labels ['negative', 'positive'], task rte"),
        ("rte", "stsb", "has 1 label(s), task rte needs 2; take a model of this task"),
        ("stsb", "rte", "has 2 label(s), task stsb needs 1"),
    ):
        assert_says(program.refuses(task=task, teacher=tiny_teacher(teacher_task)), part)


def test_teacher_without_label_names_is_taken(program: Program, teacher: Path) -> None:
    change_config(teacher, id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    open_run(parse(program.words(program.new_dir, "--dry_run", teacher=teacher)))


def test_teacher_that_does_not_tell_sentences_apart(program: Program, tmp_path: Path) -> None:
    teacher = save_encoder(tmp_path / "one_type", type_vocab_size=1)
    assert_says(
        program.refuses(teacher=teacher), "task rte has sentence pairs", "has 1 token type", "take a BERT with 2"
    )


def test_tokenizer_without_token_types(program: Program, teacher: Path) -> None:
    file = teacher / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "model_input_names": ["input_ids", "attention_mask"]}))
    assert_says(
        program.refuses(teacher=teacher), f"the tokenizer of --teacher {teacher} gives no token_type_ids", "use"
    )


def test_ptp_left_out_by_the_stages(program: Program, teacher: Path) -> None:
    message = program.refuses("--stages", "distill", teacher=teacher)
    assert_says(message, "--stages distill distils a PTP student, but the ptp stage has not run in ", "set --no_ptp")


# -- Data --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tiny_data: Path, tmp_path: Path) -> Path:
    """A data folder to spoil."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_no_data(program: Program, spoiled: Path) -> None:
    shutil.rmtree(spoiled / "rte")
    message = program.refuses(data_dir=spoiled)
    assert_says(
        message, f"no rte/train-*.parquet in data folder {spoiled}", "give --data_dir (or PEAKD_DATA_DIR)", "hub"
    )


def test_no_data_and_no_hub(program: Program) -> None:
    message = program.refuses(data_dir="")
    assert_says(message, "no data for task rte", "go online, or give --data_dir (or PEAKD_DATA_DIR)")


@pytest.mark.parametrize("num_bytes", [0, 500])
def test_truncated_parquet(program: Program, spoiled: Path, num_bytes: int) -> None:
    file = next((spoiled / "rte").glob("validation-*"))
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert_says(program.refuses(data_dir=spoiled), f"{file} is not a complete parquet file", "get it again")


def test_parquet_without_rows(program: Program, spoiled: Path) -> None:
    file = write_split(spoiled, "rte", "train", {name: [] for name in ("sentence1", "sentence2", "label")})
    assert_says(program.refuses(data_dir=spoiled), f"{file} has no rows; get the train split of rte again")


READER = """
import os, sys
from pathlib import Path
from peakd_ds.data.parquet_files import read_table
before = os.listdir("/proc/self/task")
read_table(Path(sys.argv[1]), ["sentence1", "label"])
sys.exit(os.listdir("/proc/self/task") != before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_rows_are_read_without_threads(tiny_data: Path) -> None:
    """Where memory is limited and no thread starts, pyarrow's readers wait for theirs without end."""
    file = next((tiny_data / "rte").glob("train-*"))
    subprocess.run([sys.executable, "-c", READER, str(file)], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=120)


def test_label_out_of_range(program: Program, spoiled: Path) -> None:
    columns = made_up_rows("mnli", 30, "")  # label 2 is mnli's contradiction
    columns = {"sentence1": columns["premise"], "sentence2": columns["hypothesis"], "label": columns["label"]}
    for split in ("train", "validation"):
        pq.write_table(pa.table(columns), next((spoiled / "rte").glob(f"{split}-*")))
    message = program.refuses(data_dir=spoiled)
    assert_says(message, "row 2 has label 2; it must be a whole number from 0 to 1", "fix the data")


def test_too_few_rows_to_hold_out(program: Program, spoiled: Path) -> None:
    write_split(spoiled, "rte", "train", made_up_rows("rte", 9, ""))
    message = program.refuses(data_dir=spoiled)
    assert_says(message, "task rte has 9 training rows, too few to hold out a tenth; set --select_on dev")
    open_run(parse(program.words(program.new_dir, "--select_on", "dev", data_dir=spoiled)))


# -- The run folder ----------------------------------------------------------------------------------------------------


def test_run_folder_below_a_file(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run" / "deeper"):
        with pytest.raises(UserError) as caught:
            open_run(parse(program.words(folder)))
        assert_says(str(caught.value), f"--run_dir {folder} cannot be written", "is no folder you may", "take another")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_run_folder_without_permission(program: Program, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        open_run(parse(program.words(tmp_path / "locked" / "run")))
    assert not list((tmp_path / "locked").iterdir())


@pytest.fixture
def used(program: Program) -> Path:
    """The folder of a run that has started."""
    open_run(parse(program.words(program.run_dir)))
    return program.run_dir


@pytest.mark.parametrize(
    ("words", "diff"),
    [
        ("--lr 1e-3", "lr: 2e-05 -> 0.001"),
        ("--seed 7 --beta 1", "beta: 100.0 -> 1.0; seed: 42 -> 7"),
        ("--no_ptp", "ptp: True -> False"),
        ("--dropout 0", "dropout: None -> 0.0"),
        ("--layer_map 1:2", "layer_map: skip -> [[1, 2]]"),
        ("--dtype bf16", "dtype: fp32 -> bf16"),
        ("--task sst2", "task: rte -> sst2"),
    ],
)
def test_changed_settings_in_a_used_run_folder(program: Program, used: Path, words: str, diff: str) -> None:
    before = snapshot(used)
    with pytest.raises(UserError) as caught:
        open_run(parse(program.words(used, *words.split())))
    assert_says(
        str(caught.value), f"--run_dir {used} holds a run with other settings ({diff})", "take another --run_dir"
    )
    assert snapshot(used) == before


def test_changes_that_do_not_change_the_result_are_taken(program: Program, used: Path) -> None:
    before = snapshot(used)
    changes = {"micro_batch_size": "4", "student_ds_config": "zero3_fp32", "log_steps": "1", "stages": "teacher"}
    open_run(parse(program.words(used, **changes)))
    assert snapshot(used) == before


def test_other_rows_in_a_used_run_folder(program: Program, used: Path, spoiled: Path) -> None:
    """Its PTP labels and checkpoints belong to the rows they were made from."""
    write_split(spoiled, "rte", "train", made_up_rows("rte", 90, "other"))
    before = snapshot(used)
    with pytest.raises(UserError) as caught:
        open_run(parse(program.words(used, data_dir=spoiled)))
    assert_says(str(caught.value), f"--run_dir {used} holds a run on other rows than {spoiled} has now", "take another")
    assert snapshot(used) == before


@pytest.mark.parametrize("name", ["teacher", "student", "checkpoints"])
def test_models_without_settings_in_the_run_folder(program: Program, name: str) -> None:
    (program.run_dir / name).mkdir()
    before = snapshot(program.run_dir)
    with pytest.raises(UserError, match=rf"holds {name}, .* but no config\.yaml of a run; .*take another --run_dir"):
        open_run(parse(program.words(program.run_dir)))
    assert snapshot(program.run_dir) == before


def test_damaged_settings_in_a_used_run_folder(program: Program, used: Path) -> None:
    (used / "config.yaml").write_text("lr: [")
    before = snapshot(used)
    with pytest.raises(UserError, match=r"config\.yaml is no config\.yaml of a run .*; take another --run_dir"):
        open_run(parse(program.words(used)))
    assert snapshot(used) == before


# -- While it runs -----------------------------------------------------------------------------------------------------

SHORT = "--stages teacher --epochs 2 --global_batch_size 32 --save_steps 2 --log_steps 1 --student_ds_config zero0_fp32"


@contextlib.contextmanager
def spoiled_loss(monkeypatch: pytest.MonkeyPatch, at_step: int, value: float) -> Iterator[None]:
    """The hard loss takes `value` in that step and in all later ones."""
    compute, calls = stages.distillation_loss, []

    def spoiled(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        loss = compute(*args, **settings)
        factor = value if len(calls) >= at_step else 1.0
        return loss._replace(total=loss.total * factor, hard=loss.hard * factor)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "distillation_loss", spoiled)
        yield


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(program: Program, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    argv = program.words(program.run_dir, *SHORT.split())
    with spoiled_loss(monkeypatch, at_step=5, value=value), pytest.raises(UserError) as caught:
        train.main(parse(argv))
    message = str(caught.value)
    assert_says(message, "teacher step 5: hard_loss is NaN or infinite; the last good checkpoint is kept", "lower --lr")
    kept = program.run_dir / "checkpoints" / "teacher"
    assert checkpoint.newest(kept) == (kept / "step-00000004", [])
    steps = [json.loads(line) for line in (program.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all("NaN" not in json.dumps(record) for record in steps)
    if value != float("inf"):  # once is enough
        train.main(parse(argv))  # goes on from there to the end
        assert checkpoint.finished(kept) is not None


@pytest.mark.parametrize("words", ["--save_steps 1", "--save_steps 0 --epochs 1"])
def test_a_finite_loss_with_a_gradient_that_is_not(
    program: Program, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Found where it shows first: in the weights to be saved, or in the predictions at the end of the epoch."""
    compute = stages.distillation_loss

    def spoiled(*args: Any, **settings: Any) -> Any:
        loss = compute(*args, **settings)
        return loss._replace(total=loss.total + 0 * (loss.total - loss.total.detach()).sqrt())  # d sqrt(0) = inf

    monkeypatch.setattr(stages, "distillation_loss", spoiled)
    with pytest.raises(UserError, match=r"teacher step \d: .*(NaN or infinite)") as caught:
        train.main(parse(program.words(program.run_dir, *SHORT.split(), "--max_grad_norm", "0", *words.split())))
    assert REMEDY.search(str(caught.value))
    assert checkpoint.newest(program.run_dir / "checkpoints" / "teacher") == (None, [])


def test_no_space_left(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = checkpoint.save_file, []

    def full_disk(tensors: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) > 4:
            Path(file).write_bytes(b"the part that fitted")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(UserError) as caught:
            train.main(parse(program.words(program.run_dir, *SHORT.split())))
    message = str(caught.value)
    assert_says(message, "cannot be written ([Errno 28] No space left on device", "what was saved before is untouched")
    assert REMEDY.search(message)
    kept = program.run_dir / "checkpoints" / "teacher"
    assert checkpoint.newest(kept) == (kept / "step-00000002", [])
    assert not list(kept.glob("*.tmp"))


# -- The program itself ------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown option": ("--tempreature 3", "unknown option --tempreature; did you mean --temperature?"),
    "unknown task": ("--task rte2", "unknown task 'rte2'; use one of cola, sst2"),
    "stage 1 teacher": ("--teacher_ds_config zero1_fp32", "has ZeRO stage 1, which shards optimizer states"),
    "truncated parquet": ("--data_dir TRUNCATED", "is not a complete parquet file"),
    "changed settings": ("--alpha 0.25", "holds a run with other settings (alpha: 0.7 -> 0.25); nothing was changed"),
}


@pytest.fixture(scope="module")
def truncated(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a file cut off by a hundred bytes."""
    folder = Path(shutil.copytree(tiny_data, tmp_path_factory.mktemp("truncated") / "data"))
    file = next((folder / "rte").glob("train-*"))
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def mistaken(name: str, program: Program, truncated: Path) -> list[str]:
    """A command line with that mistake, for a run folder that holds a run of other settings if that is it."""
    if name == "changed settings":
        open_run(parse(program.words(program.run_dir)))
    return program.words(program.run_dir, *MISTAKES[name][0].replace("TRUNCATED", str(truncated)).split())


def assert_one_line(name: str, error: str) -> None:
    assert len(error.splitlines()) == 1, error
    assert error.startswith("train.py: error: ") and MISTAKES[name][1] in error and REMEDY.search(error)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_program_says_one_line(
    name: str,
    program: Program,
    truncated: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *mistaken(name, program, truncated)])
    before = snapshot(program.run_dir)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    assert_one_line(name, capsys.readouterr().err)
    assert snapshot(program.run_dir) == before


@pytest.fixture(scope="module")
def processes(
    tiny_encoder: Path, tiny_data: Path, truncated: Path, tmp_path_factory: pytest.TempPathFactory, single_rank: None
) -> Iterator[dict[str, tuple[Program, Snapshot, Future[Any]]]]:
    """The real program with three of the mistakes. Most of its time are imports, so two run at once."""
    folder = tmp_path_factory.mktemp("processes")
    with ThreadPoolExecutor(max_workers=2) as threads:
        started = {}
        for name in ("unknown option", "truncated parquet", "changed settings"):
            program = Program(folder / name, tiny_encoder, tiny_data)
            command = [sys.executable, "peakd_ds/train.py", *mistaken(name, program, truncated)]
            future = threads.submit(
                subprocess.run, command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
            )
            started[name] = (program, snapshot(program.run_dir), future)
        yield started


@pytest.mark.parametrize("name", ["unknown option", "truncated parquet", "changed settings"])
def test_the_process_says_one_line(processes: dict[str, tuple[Program, Snapshot, Future[Any]]], name: str) -> None:
    program, before, future = processes[name]
    done = future.result()
    assert done.returncode == 2
    assert_one_line(name, done.stderr)
    assert "Traceback" not in done.stdout
    assert snapshot(program.run_dir) == before
