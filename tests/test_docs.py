"""Commands in the documentation do what the text says. They are taken from the pages and run, in a page's order.

They run in this process, on one rank, in a folder with the files that the pages call the reader's. docs_blocks.py has
the marks of blocks that need more; of these the options are read, and the test of each page prints which they are.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import conftest
import docs_blocks
import measure_traffic
import pytest
import torch
import walk
import yaml
from docs_blocks import PAGES, ROOT, Block, blocks_of
from test_own_pipeline import write_rows
from transformers import BertConfig, MPNetConfig

from peakd_ds import train
from peakd_ds.command_line import build_parser, parse
from peakd_ds.programs import glue_eval, planner, predict, scripts, sweep, tables
from peakd_ds.programs.grid import Element, read_grid

Words = Sequence[str]
PROGRAMS: dict[str, Callable[[Words], object]] = {
    "deepspeed peakd_ds/train.py": lambda words: train.main(parse(words)),
    "peakd-train": lambda words: train.main(parse(words)),
    "peakd-eval": lambda words: glue_eval.main(scripts.evaluate_options(words)),
    "peakd-predict": lambda words: predict.main(scripts.predict_options(words)),
    "peakd-plan": lambda words: planner.main(scripts.plan_options(words)),
    "peakd-sweep": lambda words: sweep.main(scripts.sweep_options(words)),
    "peakd-report": lambda words: tables.main(scripts.report_options(words)),
    "python benchmarks/measure_traffic.py tables": lambda words: print(measure_traffic.tables(words)),
}
"""What a command starts here, in this process, on one rank."""
READERS: dict[str, Callable[[Words], object]] = {
    "deepspeed peakd_ds/train.py": parse,
    "slurm/distill.sh": parse,
    "slurm/preflight.sh": parse,
    "slurm/shard_glue.sh": scripts.shard_options,
    "measure_traffic.py measure": parse,
    "peakd-sweep": lambda words: read_grid(scripts.sweep_options(words).grid, scripts.sweep_options(words).overrides),
    "peakd-report": scripts.report_options,
}
"""What reads the options of a command that is not run; they follow this name."""
OTHER_PROGRAMS = ("pip install", "cp", "set -a;", ".", "scancel", "scontrol", "tail", "tensorboard", "pytest")
"""Programs that are not ours, whose options nobody reads here."""
OTHERS_OPTIONS = {"--array", "--launcher", "--mpi", "--nodes", "--nnodes", "--num_gpus", "--port", "--signal"}
OTHERS_OPTIONS |= {
    "--chdir",
    "--hostfile",
    "--master_addr",
    "--master_port",
    "--no_ssh",
    "--no_ssh_check",
    "--node_rank",
}
"""Options of other programs, in the text of pages."""


def is_run_here(block: Block) -> bool:
    return block.language != "text" and not block.is_output and block.needs <= {"hub"}


@pytest.fixture
def readers_folder(
    tmp_path: Path, tiny_encoder: Path, tiny_data: Path, classifier_of, tiny_teacher, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder: the repository's, with what the pages take as the reader's files, models and data."""
    from tiny_families import save_family

    monkeypatch.chdir(tmp_path)
    for name in ("benchmarks", "docs", "peakd_ds", "slurm"):
        Path(name).symlink_to(ROOT / name)
    Path("my-classifier").symlink_to(classifier_of(*conftest.TICKETS))
    for name in ("some-encoder", "bert-base-uncased"):
        Path(name).symlink_to(tiny_encoder)
    Path("TEACHER").symlink_to(tiny_teacher("rte"))
    save_family(Path("my-deberta"), "deberta-v2")
    save_family(Path("xlm-roberta-base"), "xlm-roberta")
    MPNetConfig(max_position_embeddings=514).save_pretrained("mpnet")
    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    BertConfig(**minilm).save_pretrained("minilm")
    write_rows(Path("tickets.csv"), conftest.ticket_rows(60, "tickets"))
    write_rows(Path("new-tickets.csv"), conftest.ticket_rows(20, "new"))
    write_rows(Path("mails.jsonl"), [{"text": row["text"]} for row in conftest.ticket_rows(40, "mails")])
    Path("my.yaml").write_text("task: rte\nteacher: my-encoder\nrun_dir: runs/mine\nepochs: 1\n")
    Path("my-encoder").symlink_to(tiny_encoder)
    Path("demo/run").mkdir(parents=True)
    Path("demo/encoder").symlink_to(tiny_encoder)
    Path("demo/run/teacher").symlink_to(tiny_teacher("movie_reviews"))
    for split, num_rows in (("train", 60), ("validation", 20)):
        conftest.write_split(Path("demo/data"), "movie_reviews", split, conftest.made_up_rows("sst2", num_rows, split))
    monkeypatch.setenv("PEAKD_DATA_DIR", str(tiny_data))
    return tmp_path


@pytest.fixture
def names_of_python() -> dict[str, object]:
    """What a page's Python code takes as given: tensors of a batch of 4, of 2 classes, [CLS] vectors of 3 layers."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, requires_grad=True)  # noqa: E731
    vectors = {f"{who}_cls": [random(4, 8) for _ in range(3)] for who in ("student", "teacher")}
    labels = torch.tensor([0, 1, 1, 0])
    return {"student_logits": random(4, 2), "teacher_logits": random(4, 2), "labels": labels, **vectors}


def run_command(command: str) -> None:
    """Run a shell line in this process. Fails for a program that cannot be run here."""
    program = next((name for name in PROGRAMS if command.startswith(f"{name} ")), None)
    assert program, f"cannot run '{command}' here; mark its block with what it needs, as tests/docs_blocks.py says"
    try:
        status = PROGRAMS[program](shlex.split(command.removeprefix(program)))
    except SystemExit as end:  # --help
        status = end.code
    assert status in (None, 0), command


def read_command(command: str) -> None:
    """Check a line of a block that is not run: its options are read, and the files that it names are there."""
    for name, read in READERS.items():
        if f"{name} " in command and not command.startswith("jobid="):
            words = shlex.split(command.split(name, 1)[1].split(" >> ")[0].replace("$((8 / n))", "8"))
            read(words)
            break
    else:
        first = command.split("&&")[0]
        targets = re.findall(r"^make ([\w-]+)$", first.strip())
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), command
        known = (*OTHER_PROGRAMS, "jobid=", "slurm/", "sbatch", "python benchmarks/")
        assert targets or command.startswith(known), f"nothing checks '{command}'"
    for path in re.findall(r"\b(?:slurm|benchmarks|tests|peakd_ds)/[\w/.]+", command):
        assert (ROOT / path).exists() or path == "slurm/site.sh", f"{path} is not in the repository"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_a_page_s_blocks(
    page: str,
    readers_folder: Path,
    names_of_python: dict[str, object],
    single_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its blocks run in their order, but for those that need more than this machine; of these the options are read."""

    def run_element(element: Element, num_ranks: int | None) -> None:
        train.main(parse(element.words))

    monkeypatch.setattr(sweep, "run", run_element)
    printed, not_run = "", []
    for block in blocks_of(page):
        if block.is_output:
            assert printed.strip() == block.text.strip(), f"{block}: the commands before it print something else"
        elif block.language == "text":
            continue
        elif not is_run_here(block):
            not_run.append(f"{block}: {', '.join(sorted(block.needs))}: {'; '.join(block.commands)}")
            for command in block.commands:
                read_command(command)
        elif block.language == "python":
            exec(compile(block.text, str(block), "exec"), names_of_python)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), str(block)
            if block.file:
                Path(block.file).write_text(block.text)
        else:
            capsys.readouterr()
            for command in block.commands:
                run_command(command)
            printed = capsys.readouterr().out
    check_results(page)
    print("not run:", *not_run, sep="\n  ")


def check_results(page: str) -> None:
    """What the commands of a page should have left, beyond their success."""
    runs = {
        "README.md": ("tickets", "rte", "mine"),
        "docs/families.md": ("rte",),
        "docs/your-data.md": ("tickets", "tickets-and-mails", "mails", "from-outputs"),
    }
    for name in runs.get(page, ()):
        assert Path("runs", name, "student_unrolled", "model.safetensors").exists(), name
    if page == "README.md":
        assert len(Path("predictions.jsonl").read_text().splitlines()) == 20
    if page == "docs/your-data.md":
        assert len(Path("predictions.csv").read_text().splitlines()) == 21
    if page == "docs/sweeps.md":
        assert "kd" in Path("tables/report.md").read_text()
        assert len([*Path("runs/small").rglob("results.json")]) == 4


@pytest.mark.parametrize("command", ["make demo", "peakd-nothing --x 1", "pip install ."])
def test_a_command_that_cannot_be_run_here_needs_a_mark(command: str) -> None:
    with pytest.raises(AssertionError, match="mark its block"):
        run_command(command)


@pytest.mark.parametrize("command", ["peakd-nothing --x 1", "make nothing", "sbatch slurm/nothing.sh"])
def test_a_command_that_is_not_run_is_read(command: str) -> None:
    with pytest.raises(AssertionError):
        read_command(command)


def test_an_unknown_mark_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_blocks, "ROOT", tmp_path)
    for text in ("<!-- needs: luck -->\n```sh\nls\n```\n", "```\nls\n```\n", "<!-- outputs -->\n```sh\nls\n```\n"):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(ValueError, match=r"page\.md:"):
            blocks_of("page.md")


def test_the_walk_goes_from_installing_to_a_shipped_student() -> None:
    taken, left_out = walk.blocks_of_walk()
    commands = [command for block in taken for command in block.commands]
    order = ("make demo", "pip install .", "peakd-train --train_file", "peakd-predict", "pipeline(", "tensorboard")
    places = [next(n for n, command in enumerate(commands) if command.startswith(start)) for start in order]
    assert places == sorted(places)
    assert all(re.search(r": needs .*(hub|cluster|gpu|hours)", line) for line in left_out)


def test_titles_of_charts() -> None:
    page = '<tb-truncated-path class="tag" title="distill/loss &amp; more"><span title="train">'
    assert walk.charts_of(page) == ["distill/loss & more"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_fenced_blocks(page: str) -> None:
    """Indented blocks would escape the test; each fence that opens is one that was read."""
    text = (ROOT / page).read_text()
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks_of(page))
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\n\n {4,}\S", outside), "an indented block; write it between ``` lines"


def test_options_in_the_text_are_there() -> None:
    """Options between backquotes, of whatever program of ours."""
    ours = {word for action in build_parser()._actions for word in action.option_strings}
    source = "".join(path.read_text() for path in [*ROOT.glob("benchmarks/*.py"), Path(scripts.__file__)])
    ours |= set(re.findall(r"--\w+", source))
    ours |= {f"--{name}" for name in re.findall(r'parser\.add_number\([^"]*"(\w+)"', source)}
    ours |= {f"--{name}" for name in scripts.PLAN_NUMBERS}
    for page in PAGES:
        code = re.findall(r"`([^`\n]*)`", (ROOT / page).read_text())
        named = {word for text in code for word in re.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", text)}
        assert named - ours <= OTHERS_OPTIONS, page
