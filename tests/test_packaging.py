"""The wheel is complete, no name of ours hides another, and the project's files agree with each other."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peakd_ds

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FOLDERS = {"peakd_ds": "peakd_ds", "kernels": "peakd_ds/kernels", "ds_configs": "peakd_ds/ds_configs"}
PACKAGED_SUFFIXES = {".py", ".json", ".yaml", ".typed"}
# Looked up by name, if installed, by transformers, datasets, deepspeed or torch.
OPTIONAL_IMPORT_NAMES = {
    *("accelerate", "apex", "bitsandbytes", "comet_ml", "evaluate", "flash_attn", "jax", "kernels"),
    *("optimum", "peft", "sentencepiece", "tensorflow", "torchvision", "wandb"),
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_files(folder: str) -> set[str]:
    """Paths, inside the folder, of the files that belong into the wheel."""
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in PACKAGED_SUFFIXES and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: a build in place would take along what earlier builds left in build/."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(copy)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    expected = {f"{target}/{name}" for folder, target in PACKAGE_FOLDERS.items() for name in source_files(folder)}
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert "peakd_ds/kernels/__init__.py" in found
    assert any(re.fullmatch(r"peakd_ds/ds_configs/\w+\.json", name) for name in found)
    assert "peakd_ds/recipes/__init__.py" in found


def test_wheel_says_its_version_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        metadata = next(name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        text = opened.read(metadata).decode()
        licence = opened.read(metadata.replace("METADATA", "licenses/LICENSE")).decode()
    version = re.search(r"^Version: (\S+)$", text, re.MULTILINE)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version and version[1] == peakd_ds.__version__ == headings[0], "the newest section of CHANGELOG.md"
    assert licence == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("script", sorted(PYPROJECT["project"]["scripts"]))
def test_console_script_names_a_function(script: str) -> None:
    module, function = PYPROJECT["project"]["scripts"][script].split(":")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install .` installs, beside the tests' environment, which has the dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


ASK_ALL_FOR_HELP = """
import contextlib, importlib.metadata, io, sys
import peakd_ds
assert peakd_ds.__file__.startswith(sys.argv[1]), peakd_ds.__file__
(distribution,) = importlib.metadata.distributions(name="peakd-ds", path=[sys.argv[1]])
for script in distribution.entry_points:
    sys.argv, printed = [script.name, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            script.load()()
    except SystemExit as end:
        assert end.code == 0 and printed.getvalue().startswith("usage: "), script.name
        print(script.name)
assert "torch" not in sys.modules, "torch was imported"
"""


def test_installed_console_scripts_answer(installed: Path, tmp_path: Path) -> None:
    """All in one process, then one as its own program."""
    run = partial(subprocess.run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, text=True)
    asked = run([sys.executable, "-c", ASK_ALL_FOR_HELP, str(installed)], capture_output=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert set(asked.stdout.split()) == set(PYPROJECT["project"]["scripts"])
    assert {path.name for path in (installed / "bin").iterdir()} >= set(PYPROJECT["project"]["scripts"])
    version = run([str(installed / "bin" / "peakd-train"), "--version"], capture_output=True, check=True)
    assert version.stdout == f"peakd_ds {peakd_ds.__version__}\n"


# `deepspeed peakd_ds/train.py` puts peakd_ds/ itself first on sys.path.
@pytest.mark.parametrize("folder", ["peakd_ds", "kernels"])
def test_no_module_shares_the_name_of_another(folder: str) -> None:
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"peakd-ds"}}
    ours = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    ours |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert ours
    clashes = ours & (set(sys.stdlib_module_names) | installed | OPTIONAL_IMPORT_NAMES)
    assert clashes == set()


@pytest.fixture
def stand_in_kernels(tmp_path: Path) -> Path:
    """A folder with a stand-in for the Hugging Face `kernels` distribution, of a version in use."""
    version = subprocess.run(
        [sys.executable, "-c", "from transformers.utils.import_utils import *; print(KERNELS_MIN_VERSION)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    folder = tmp_path / "site"
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    (folder / "kernels" / "layer").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(
        "STAND_IN = True\n"
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, decorated): return decorated\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return Anything\n"
    )
    (folder / "kernels" / "layer" / "__init__.py").touch()
    (folder / "kernels" / "layer" / "mode.py").write_text("class Mode: pass\n")
    return folder


IMPORT_ALL = (
    "from transformers.utils.import_utils import is_kernels_available; assert is_kernels_available();"
    "import transformers.integrations.hub_kernels; from transformers import BertModel;"
    "import kernels; assert kernels.STAND_IN;"
    "import peakd_ds.kernels, peakd_ds.ds_configs; assert peakd_ds.kernels is not kernels;"
)


def run_python(arguments: list[str], cwd: Path, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_hugging_face_kernels_beside_ours_outside_the_repository(stand_in_kernels: Path, tmp_path: Path) -> None:
    run_python(["-c", IMPORT_ALL], cwd=tmp_path, PYTHONPATH=str(stand_in_kernels))


def test_hugging_face_kernels_beside_ours_in_the_repository_root(stand_in_kernels: Path) -> None:
    run_python(["-P", "-c", IMPORT_ALL], cwd=ROOT, PYTHONPATH=str(stand_in_kernels))


def test_hugging_face_kernels_beside_ours_for_a_script_in_the_package_folder(
    stand_in_kernels: Path, tmp_path: Path
) -> None:
    as_script = f"import sys; sys.path.insert(0, {str(ROOT / 'peakd_ds')!r}); import torch, datasets;"
    run_python(["-c", as_script + IMPORT_ALL], cwd=tmp_path, PYTHONPATH=str(stand_in_kernels))


def test_importing_the_kernels_leaves_triton_alone(tmp_path: Path) -> None:
    check = "import sys, peakd_ds.kernels; assert 'triton' not in sys.modules, 'triton was imported'"
    run_python(["-c", check], cwd=tmp_path)


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for pin in (Requirement(line) for line in lines if not line.startswith("#")):
        assert str(pin.specifier).startswith("==") and "+" not in str(pin.specifier), pin
        pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    project = PYPROJECT["project"]
    for requirement in map(Requirement, chain(project["dependencies"], *project["optional-dependencies"].values())):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_makefile_has_the_promised_targets() -> None:
    assert {"help", "venv", "demo", "test", "checks", "walk", "clean"} <= makefile_targets()


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_make_targets_named_elsewhere_exist(file: str) -> None:
    named = set(re.findall(r"(?:^|`|&& |part )make ([a-z][\w-]*)", (ROOT / file).read_text(), re.MULTILINE))
    assert named
    assert named <= makefile_targets()


def test_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_github_runs_the_ci_script_on_both_versions_of_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key on as true
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    versions = job["strategy"]["matrix"]["python-version"]
    assert versions == ["3.11", "3.12"] and all(isinstance(version, str) for version in versions)
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert versions[0] == oldest


def test_make_demo_calls_peakd_demo() -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and "/peakd-demo " in recipe[1]


def test_no_file_names_a_home_folder() -> None:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    home_folder = re.compile(rb"/(?:home/\w|Users/\w|root/)")
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert paths
    # A binary file, such as a picture, may hold these bytes by chance.
    contents = {path: path.read_bytes() for path in paths}
    assert not [path for path, content in contents.items() if b"\0" not in content and home_folder.search(content)]
