"""Grids and sweeps: the elements of a grid file, wrong files and options, and two real runs one after the other."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, made_up_rows, write_split

from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.errors import UserError
from peakd_ds.programs import scripts, sweep
from peakd_ds.programs.grid import methods, read_grid
from peakd_ds.ranks.slurm_env import job_name

BIN = Path(sys.executable).parent
GRID = """
teacher: encoder
run_dir: runs/x
num_hidden_layers: 2
grid:
  task: [rte, mrpc]
  method: [pea-kd, kd]
  seed: [1, 2, 3]
"""


@pytest.fixture
def grid_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str, name: str = "grid.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# -- Elements of a grid ------------------------------------------------------------------------------------------------


def test_lists_are_multiplied_and_the_last_varies_fastest(grid_file: Callable[[str], str]) -> None:
    grid = read_grid(grid_file(GRID))
    assert [element.name for element in grid.elements] == [
        f"{task}/{method}/seed-{seed}" for task in ("rte", "mrpc") for method in ("pea-kd", "kd") for seed in (1, 2, 3)
    ]
    assert str(grid) == "12 elements (2 task x 2 method x 3 seed) in runs/x/"
    for element in grid.elements:
        config = element.config
        assert f"{config.task}/{config.method}/seed-{config.seed}" == element.name
        assert config.run_dir == f"runs/x/{element.name}" and config.num_hidden_layers == 2
        assert parse(element.words) == config
        assert len({word.split("=")[0] for word in element.words}) == len(element.words), "no option twice"


def test_options_hold_for_every_element_and_win(grid_file: Callable[[str], str]) -> None:
    words = ["--lr=1e-4", "--num_hidden_layers", "3", "--run_dir", "elsewhere/"]
    for element in read_grid(grid_file(GRID), words).elements:
        assert (element.config.lr, element.config.num_hidden_layers) == (1e-4, 3)
        assert element.config.run_dir == f"elsewhere/{element.name}"


def test_any_setting_may_be_a_list(grid_file: Callable[[str], str]) -> None:
    lists = "{lr: [1e-5, 2.0e-5], init_layers: [[1, 2, 3], [2, 4, 6]]}"
    file = grid_file(f"{{task: rte, teacher: a/b, run_dir: R, method: kd, grid: {lists}}}")
    names = [element.name for element in read_grid(file).elements]
    assert names == [
        f"rte/kd/lr-{lr}/init_layers-{layers}/seed-42" for lr in ("1e-5", "2e-05") for layers in ("1,2,3", "2,4,6")
    ]


def test_names_in_braces_are_replaced_by_the_elements_values(grid_file: Callable[[str], str]) -> None:
    text = GRID.replace("encoder", "'{run_dir}/{task}/{method}/s{seed}'")
    for element in read_grid(grid_file(text), ["--data_dir", "data/{task}"]).elements:
        task, method, seed = element.name.split("/")
        assert element.config.teacher == f"runs/x/{task}/{method}/{seed.replace('seed-', 's')}"
        assert element.config.data_dir == f"data/{task}"


OWN = """
teacher: "{run_dir}/{task}/teacher"
run_dir: R
train_file: ["d/{name}/*.csv", extra.csv]
label_names: [big bill, other]
grid:
  name: [tickets, mails]
  seed: [1, 2]
"""


def test_rows_of_ones_own_are_varied_by_name(grid_file: Callable[[str], str]) -> None:
    elements = read_grid(grid_file(OWN), ["--validation_file", "v/{name} dev.csv"]).elements
    assert [element.name for element in elements] == [
        f"{name}/pea-kd/seed-{seed}" for name in ("tickets", "mails") for seed in (1, 2)
    ]
    for element in elements:
        config, name = element.config, element.name.split("/")[0]
        assert parse(element.words) == config and config.name == config.task_name == name
        assert config.train_file == (f"d/{name}/*.csv", "extra.csv") and config.label_names == ("big bill", "other")
        assert (config.validation_file, config.teacher) == ((f"v/{name} dev.csv",), f"R/{name}/teacher")


@pytest.mark.parametrize(
    ("lists", "names", "setting", "values"),
    [
        ("train_file: [d/a.csv, b.csv.gz]", ["a/pea-kd", "b/pea-kd"], "train_file", [("d/a.csv",), ("b.csv.gz",)]),
        (
            "train_file: [[d/a.csv, b.csv], [c d.csv]]",
            ["a/pea-kd", "c_d/pea-kd"],
            "train_file",
            [("d/a.csv", "b.csv"), ("c d.csv",)],
        ),
        (
            "train_file: [d/a.csv, b.csv], name: [x]",
            ["x/pea-kd/train_file-d_a.csv", "x/pea-kd/train_file-b.csv"],
            "name",
            ["x", "x"],
        ),
        (
            "train_file: ['d {seed}.csv'], seed: [1, 2]",
            ["d_1/pea-kd", "d_2/pea-kd"],
            "train_file",
            [("d 1.csv",), ("d 2.csv",)],
        ),
        ("train_file: [a.csv], method: [pea-kd, sps+pkd]", ["a/pea-kd", "a/sps+pkd"], "ptp", [True, False]),
        ("dataset_name: [them/a, b]", ["a/pea-kd", "b/pea-kd"], "dataset_name", ["them/a", "b"]),
        (
            "train_file: [a.csv], text_columns: [x, [x, y]]",
            ["a/pea-kd/text_columns-x", "a/pea-kd/text_columns-x,y"],
            "text_columns",
            [("x",), ("x", "y")],
        ),
    ],
)
def test_own_files_may_be_lists(
    grid_file: Callable[[str], str], lists: str, names: list[str], setting: str, values: list[object]
) -> None:
    elements = read_grid(grid_file(f"{{teacher: t, run_dir: R, grid: {{{lists}}}}}")).elements
    assert [element.name.rpartition("/seed-")[0] for element in elements] == names
    assert [getattr(element.config, setting) for element in elements] == values
    assert all(parse(element.words) == element.config for element in elements)


def test_methods_are_the_readmes_baselines() -> None:
    readme = (ROOT / "README.md").read_text()
    names = {
        "Pea-KD": "pea-kd",
        "SPS only": "sps+pkd",
        "PTP only": "ptp+pkd",
        "Patient KD": "pkd",
        "KD": "kd",
        "fine-tuned small encoder": "finetune",
        "SPS without exchange": "sps-shuffle_qk+pkd",
    }
    table = re.findall(rf"^\| ({'|'.join(names)}) \| (\(defaults\)|`.*?`)", readme, re.MULTILINE)
    assert {method for method, _ in table} == names.keys()
    required = ["--task", "rte", "--teacher", "t", "--run_dir", "r"]
    for method, options in table:
        switches = methods()[names[method]]
        assert parse([*required, *options.strip("`").replace("(defaults)", "").split()]) == parse_switches(
            required, switches
        )


def parse_switches(required: list[str], switches: dict) -> RunConfig:
    from peakd_ds.command_line import to_words

    return parse([*required, *to_words("test", switches)])


def test_every_method_gives_its_own_name() -> None:
    named = methods()
    assert {"pea-kd", "sps+pkd", "ptp+pkd", "pkd", "kd", "finetune", "cycle_rev+ptp+kd", "sps-shuffle_qk+pkd"} <= {
        *named
    }
    for name, switches in named.items():
        assert RunConfig(**switches).method == name


def test_weights_beside_a_method_hold_where_it_has_the_term(grid_file: Callable[[str], str]) -> None:
    text = GRID.replace("[pea-kd, kd]", "[pkd, kd, finetune]") + "alpha: 0.5\nbeta: 7\n"
    weights = {e.name.split("/")[1]: (e.config.alpha, e.config.beta) for e in read_grid(grid_file(text)).elements}
    assert weights == {"pkd": (0.5, 7), "kd": (0.5, 0), "finetune": (0, 0)}


def test_the_papers_recipes_fit_each_other() -> None:
    recipes = ROOT / "peakd_ds" / "recipes"
    teachers, students = (
        read_grid(str(recipes / f"paper_{name}.yaml"), ["--run_dir", "runs/paper"]) for name in ("teachers", "grid")
    )
    lists = yaml.safe_load((recipes / "paper_grid.yaml").read_text())["grid"]
    assert lists["task"] == ["rte", "mrpc", "sst2", "qnli"]
    assert lists["method"] == ["pea-kd", "sps+pkd", "ptp+pkd", "pkd", "kd", "finetune"]
    assert len(students.elements) == len(lists["task"]) * len(lists["method"]) * len(lists["seed"])
    made = {element.config.task: f"{element.config.run_dir}/teacher" for element in teachers.elements}
    for element in students.elements:
        assert element.config.teacher == made[element.config.task]
        assert element.config.method == element.name.split("/")[1]


# -- Wrong files and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("task: rte", ["has no lists to multiply", "seed: [1, 2, 3]"]),
        ("- rte", ["holds no settings"]),
        ("task: [", ["is not YAML"]),
        (GRID.replace("num_hidden", "num_hiden"), ["unknown setting 'num_hiden_layers'", "mean num_hidden_layers?"]),
        (GRID.replace("seed:", "sede:"), ["unknown setting 'sede' under grid", "did you mean seed?"]),
        (GRID.replace("pea-kd", "peakd"), ["unknown method 'peakd'", "did you mean pea-kd?"]),
        (GRID.replace("mrpc", "mrcp"), ["task mrcp, method pea-kd, seed 1: unknown task 'mrcp'", "closest: mrpc"]),
        (GRID.replace("[1, 2, 3]", "[1, 2, 1]"), ["seed under grid has 1 twice"]),
        (GRID.replace("[1, 2, 3]", "7"), ["seed under grid is '7'; write a list"]),
        (GRID.replace("[1, 2, 3]", "[]"), ["seed under grid is []; write a list"]),
        (GRID.replace("[1, 2, 3]", "[1, -1]"), ["seed -1: --seed -1 is outside its range"]),
        (GRID + "seed: 7\n", ["seed is both under grid and beside it"]),
        (GRID + "sharing: cycle\n", ["sharing follows from method"]),
        (GRID + "alpha: 0\n", ["--alpha 0 and --beta 0 make it finetune", "set them above 0"]),
        (GRID + "temperature: 0\n", ["--temperature 0.0 is outside its range [0.01, 1000]"]),
        (GRID + "dry_run: true\n", ["--dry_run trains nothing", "--list"]),
        (GRID + "  save_steps: [1, 2]\n", ["save_steps does not change a run's result", "beside grid"]),
        (
            GRID.replace("encoder", "'{tsk}/encoder'"),
            ["{tsk} in --teacher={tsk}/encoder is not a setting", "task?"],
        ),
        (GRID.replace("runs/x", "'runs/{task}'"), ["--run_dir runs/{task} is the one folder for all elements"]),
        (GRID.replace("run_dir: runs/x", ""), ["--run_dir is missing"]),
        (GRID.replace("teacher: encoder", ""), ["--teacher is missing"]),
        (
            GRID.replace("mrpc", "stsb").replace("kd]", "sps+pkd]"),
            ["stsb/pea-kd/seed-1 and stsb/sps+pkd/seed-1 would be"],
        ),
        (
            "{task: rte, teacher: t, run_dir: R, grid: {lr: [1e-5, 1.0e-5]}}",
            ["lr-1e-5/seed-42 and", "would be the same"],
        ),
        ("{task: rte, run_dir: R, grid: {teacher: [a/b, a_b]}}", ["would be the same run"]),
        (
            "{teacher: t, run_dir: R, grid: {train_file: [x/a.csv, y/a.csv]}}",
            ["would be the same run; drop one, or list name in place of train_file, and write {name} there"],
        ),
        (
            "{teacher: t, run_dir: R, train_file: a.csv, grid: {name: [x, y]}}",
            ["x/pea-kd/seed-42 and y/pea-kd/seed-42"],
        ),
        (
            "{teacher: t, run_dir: R, grid: {train_file: ['{name}.csv']}}",
            ["{name}.csv has the rows' name", "give name"],
        ),
        ("{teacher: t, run_dir: R, grid: {train_file: ['{sed}.csv']}}", ["{sed} in {sed}.csv is not a setting"]),
        ("{teacher: t, run_dir: R, grid: {train_file: [[[a.csv]]]}}", ["train_file: [['a.csv']] does not fit"]),
        (OWN + "task: rte\n", ["--task rte brings its own rows", "--train_file is given too; leave one out"]),
        (OWN + "  scratch_dir: [a, b]\n", ["scratch_dir does not change a run's result"]),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(grid_file: Callable[[str], str], text: str, parts: list[str]) -> None:
    file = grid_file(text)
    with pytest.raises(UserError) as caught:
        read_grid(file)
    message = str(caught.value)
    assert message.startswith(f"--grid {file}") and "\n" not in message and message.isascii()
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--seed", "3"], "--seed is a list of --grid"),
        (["--task=rte"], "--task is a list of --grid"),
        (["--no_ptp"], "ptp follows from method"),
        (["--temprature=3"], "unknown option --temprature=3; did you mean --temperature?"),
        (["--index", "12"], "the grid has no element 12; choose from 0 to 11"),
        (["--options=-1"], "--options -1 is outside its range [0, 9999]"),
        (["--index", "two"], "'two' is not a whole number; set one in [0, 9999]"),
        (["--ranks", "0"], "--ranks 0 is outside its range [1, 1024]"),
        (["--list", "--index", "1"], "not allowed with argument --list"),
        (["--submit", "--array=0-3"], "--array follows from the grid"),
        (["--submit", "-a0-3"], "--array follows from the grid"),
    ],
)
def test_a_wrong_option_is_refused_with_nothing_written(
    grid_file: Callable[[str], str], tmp_path: Path, words: list[str], part: str
) -> None:
    file = grid_file(GRID.replace("runs/x", str(tmp_path / "runs")))
    with pytest.raises(UserError, match=re.escape(part)):
        sweep.main(scripts.sweep_options(["--grid", file, *words]))
    assert not (tmp_path / "runs").exists()


def test_the_program_ends_with_code_2_and_one_line(tmp_path: Path, env: dict[str, str]) -> None:
    command = [str(BIN / "peakd-sweep"), "--grid", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"peakd-sweep: error: --grid \S+ cannot be read \(.*\); give a YAML file.*\n", done.stderr)


# -- Slurm -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch that writes its arguments to a file, NUL after each."""
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {shlex.quote(str(tmp_path / "words"))}\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "sweep.sh").touch()
    return tmp_path / "words"


def finish(element_config: RunConfig) -> None:
    """Write the files of a finished run that `state` reads."""
    from peakd_ds.command_line import to_yaml

    folder = Path(element_config.run_dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(element_config).replace("dtype: auto", "dtype: bf16"))
    (folder / "results.json").write_text(json.dumps({"student": {}, "settings": {"stages": ["distill"]}}))


def test_the_array_has_the_unfinished_elements(grid_file: Callable[[str], str], tmp_path: Path, sbatch: Path) -> None:
    runs = tmp_path / "my runs"
    file = grid_file(GRID.replace("runs/x", f"'{runs}'"))
    words = ["--lr", "1e-4", "--at_once", "4", "--submit", "--nodes=2", "--comment", "a b; $(c)"]
    assert sweep.main(scripts.sweep_options(["--grid", file, *words])) == 3, "sbatch's exit code"
    (copy,) = (runs / "grids").glob("grid-????????.yaml")
    assert copy.read_bytes() == Path(file).read_bytes()
    script = "slurm/sweep.sh"
    expected = ["--array=0-11%4", "--nodes=2", "--comment", "a b; $(c)", script, str(copy), "--lr", "1e-4"]
    assert sbatch.read_text().split("\0")[:-1] == expected
    for number in (0, 4, 5, 6):
        finish(read_grid(file).elements[number].config)
    sweep.main(scripts.sweep_options(["--grid", file, "--submit"]))
    assert sbatch.read_text().split("\0")[0] == "--array=1-3,7-11"
    for number in (1, 2, 3, 7, 8, 9, 10, 11):
        finish(read_grid(file).elements[number].config)
    sbatch.unlink()
    assert sweep.main(scripts.sweep_options(["--grid", file, "--submit"])) == 0 and not sbatch.exists(), (
        "nothing is left to submit"
    )


def test_an_element_of_the_array_gets_its_options(
    grid_file: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = grid_file(GRID.replace("runs/x", f"'{tmp_path}/my runs'"))
    assert sweep.main(scripts.sweep_options(["--grid", file, "--options", "4", "--data_dir", "a b"])) == 0
    words = capsys.readouterr().out.split("\0")
    assert words.pop() == ""
    assert parse(words).run_dir == f"{tmp_path}/my runs/rte/kd/seed-2" and parse(words).data_dir == "a b"


def test_a_missing_sbatch_is_refused(
    grid_file: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        sweep.main(
            scripts.sweep_options(["--grid", grid_file(GRID.replace("runs/x", str(tmp_path / "runs"))), "--submit"])
        )
    (tmp_path / "slurm" / "sweep.sh").unlink()
    with pytest.raises(UserError, match=r"no slurm/sweep\.sh here; go to the repository's root"):
        sweep.main(
            scripts.sweep_options(["--grid", grid_file(GRID.replace("runs/x", str(tmp_path / "runs"))), "--submit"])
        )


def test_the_job_name_of_an_element_has_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job number of an array's last element is also the number of the array."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert job_name() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert job_name() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_name() == "12_3"


def test_the_array_has_the_options_of_a_single_job() -> None:
    """sbatch reads options only from the submitted script; the two scripts differ only in the name of the output."""
    headers = []
    for name in ("sweep.sh", "distill.sh"):
        lines = (ROOT / "slurm" / name).read_text().splitlines()
        headers.append([line for line in lines if line.startswith("#SBATCH") and "--output" not in line])
    assert headers[0] == headers[1] and headers[0]


# -- Running -----------------------------------------------------------------------------------------------------------


def test_a_run_with_other_settings_does_not_count_as_finished(
    grid_file: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = grid_file(GRID.replace("runs/x", str(tmp_path / "runs")))
    elements = read_grid(file).elements
    for element in elements[:2]:
        finish(element.config)
    (Path(elements[2].config.run_dir)).mkdir(parents=True)
    (Path(elements[2].config.run_dir) / "config.yaml").touch()
    states = ["finished", "finished", "unfinished", "not started"]
    assert [sweep.state(element) for element in elements[:4]] == states
    (Path(elements[1].config.run_dir) / "results.json").write_text('{"student": {')
    assert sweep.state(elements[1]) == "unfinished"
    assert sweep.state(read_grid(file, ["--lr=1"]).elements[0]) == "unfinished"
    sweep.main(scripts.sweep_options(["--grid", file, "--list"]))
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed[0] == ["0", "rte/pea-kd/seed-1", "finished"] and listed[11] == ["11", "mrpc/kd/seed-3", "not started"]


@pytest.mark.starts(6)
@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", "{}", "1", "null", "[" * 100_000, "9" * 5000, "dtype: [1]", "a: &a [*a]"]
    + ['{"student": null, "settings": {"stages": [[]]}}', "lr: !!python/object:a b", b"\xff\xfe", b"\0"],
)
def test_a_damaged_run_is_unfinished(
    grid_file: Callable[[str], str], tmp_path: Path, name: str, content: str | bytes
) -> None:
    element = read_grid(grid_file(GRID.replace("runs/x", str(tmp_path / "runs")))).elements[0]
    finish(element.config)
    assert sweep.state(element) == "finished"
    (Path(element.config.run_dir) / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sweep.state(element) == "unfinished"


def test_two_elements_one_of_which_fails_first(
    grid_file: Callable[[str], str], tmp_path: Path, tiny_teacher: Callable[[str], Path], env: dict[str, str]
) -> None:
    """The data of rte are missing at first: sst2 runs all the same, and the second start runs only rte."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    for task in ("sst2", "rte"):
        tiny_teacher(task)
    for split, num_rows in (("train", 40), ("validation", 10)):
        write_split(data, "sst2", split, made_up_rows("sst2", num_rows, seed=split))
    settings = {"teacher": str(tiny_teacher("rte").parent / "{task}"), "num_hidden_layers": 2, "dtype": "fp32"}
    lists = {"task": ["rte", "sst2"], "method": ["kd"], "seed": [7]}
    file = grid_file(yaml.safe_dump({**settings, "epochs": 1, "global_batch_size": 16, "lr": 1e-3, "grid": lists}))
    command = [
        str(BIN / "peakd-sweep"),
        "--grid",
        file,
        "--run_dir",
        str(runs),
        "--data_dir",
        str(data),
        "--ranks",
        "1",
    ]

    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    reason = "exit code 2: train.py: error: no rte/train-*.parquet in data folder"
    assert f"failed: 1 of 2\n  rte/kd/seed-7: {reason}" in done.stdout
    assert (runs / "rte/kd/seed-7.failed").read_text().startswith(reason)
    assert json.loads((runs / "sst2/kd/seed-7/results.json").read_text())["method"] == "kd"
    report = [str(BIN / "peakd-report"), str(runs)]
    done = subprocess.run(report, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| sst2 +\| kd +\| 1 ", done.stdout, re.MULTILINE)
    assert f"Not in the table: 1\n\n- runs/rte/kd/seed-7: failed: {reason}" in done.stdout

    before = (runs / "sst2/kd/seed-7/results.json").stat().st_mtime_ns
    for split, num_rows in (("train", 40), ("validation", 10)):
        write_split(data, "rte", split, made_up_rows("rte", num_rows, seed=split))
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished already: 1\n[1/1] rte/kd/seed-7" in done.stdout and "all 1 finished" in done.stdout
    assert (runs / "sst2/kd/seed-7/results.json").stat().st_mtime_ns == before, "it was not run again"
    done = subprocess.run(report, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert re.search(r"^\| rte +\| kd +\| 1 ", done.stdout, re.MULTILINE) and "Not in the table" not in done.stdout
    assert (runs / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_sweep_leaves_no_process(
    grid_file: Callable[[str], str], tmp_path: Path, env: dict[str, str]
) -> None:
    """A shell with a child stands in for the launcher with its ranks."""
    file, pids = grid_file(GRID.replace("runs/x", str(tmp_path / "runs"))), tmp_path / "pids"
    shell = f"sleep 600 & echo $! $$ > {shlex.quote(str(pids))}.new; mv {shlex.quote(str(pids))}.new {pids}; wait"
    program = (
        "from peakd_ds.programs import scripts, sweep\n"
        f"sweep._command = lambda *_: ['sh', '-c', {shell!r}]\n"
        f"sweep.main(scripts.sweep_options(['--grid', {file!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(pids.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        wait_for(lambda: not any(is_running(int(pid)) for pid in pids.read_text().split()))
    finally:
        process.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
