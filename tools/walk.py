"""The walk of a new user: README, followed in a clean clone. `make walk` starts it; it takes some twenty minutes.

It clones the last commit into a temporary folder, makes an empty environment, and runs README's blocks there as they
stand, up to a student of an own CSV, and the blocks of other pages that are marked to take minutes. The reader's files
are made from the demo: tickets.csv and new-tickets.csv hold its sentences, and my-classifier is its teacher. Blocks
that need a hub, a cluster, a GPU or hours are listed and left out. Then it opens TensorBoard in headless Chromium,
reads the titles of the charts in the first view, and keeps pictures. These and each block's output are in build/walk/.
"""

import argparse
import csv
import html
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from docs_blocks import PAGES, Block, blocks_of  # noqa: E402

NUM_ROWS, NUM_NEW_ROWS = 1000, 200
VIEWS = {"first": "", "scalars": "#scalars", "text": "#text", "images": "#images", "hparams": "#hparams"}
"""Tabs of TensorBoard by the name of their picture."""


class WalkError(Exception):
    """A step of the walk that failed, with what to read."""


def main() -> int:
    """Walk, and print each step. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "walk", help="receives output and pictures")
    parser.add_argument("--keep", action="store_true", help="leave the clone and its environment in their place")
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    place = Path(tempfile.mkdtemp(prefix="peakd_walk_"))
    start = time.monotonic()
    try:
        walk(place, out)
    except WalkError as error:
        print(f"walk: {error}", file=sys.stderr)
        return 1
    finally:
        print(f"after {time.monotonic() - start:.0f} s; output and pictures are in {out}", flush=True)
        if options.keep:
            print(f"the clone is {place / 'clone'}", flush=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return 0


def walk(place: Path, out: Path) -> None:
    """Clone, run the blocks and look at TensorBoard. Raises WalkError for the first step that fails."""
    clone, environment = place / "clone", place / "environment"
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, check=True).stdout:
        print("the last commit is walked; changes that are not committed are left out", flush=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
    env["PATH"] = f"{environment / 'bin'}{os.pathsep}{env['PATH']}"
    env.setdefault("TORCH_EXTENSIONS_DIR", str(place / "extensions"))

    taken, left_out = blocks_of_walk()
    for number, block in enumerate(taken):
        if "browser" in block.needs:
            look(block, clone, env, out)
        else:
            run(block, clone, env, out / f"{number:02d}-{block.page.replace('/', '-')}-{block.line}.log")
        if any(command.startswith("make demo") for command in block.commands):
            write_readers_files(clone)
    print("left out:", *left_out, sep="\n  ", flush=True)


def blocks_of_walk() -> tuple[list[Block], list[str]]:
    """README's blocks, those that call make first, and other pages' that take minutes; and lines on those left out."""
    taken, left_out = [], []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language not in ("sh", "python") or block.is_output:
                continue
            if block.needs - {"minutes", "browser"}:
                left_out += [f"{block}: needs {', '.join(sorted(block.needs))}: {line}" for line in block.commands]
            elif page == "README.md" or block.needs:
                taken.append(block)
    taken.sort(key=lambda block: not any(command.startswith("make ") for command in block.commands))
    return taken, left_out


def run(block: Block, clone: Path, env: dict[str, str], log: Path) -> None:
    """Run a block as it stands, in the clone. Raises WalkError if it fails."""
    command = ["bash", "-euo", "pipefail", "-c", block.text] if block.language == "sh" else ["python", "-c", block.text]
    print(f"{block}\n    " + "\n    ".join(block.text.rstrip().splitlines()), flush=True)
    start = time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run(
            command, cwd=clone, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
    print(f"  {'done' if code == 0 else f'exit code {code}'} after {time.monotonic() - start:.0f} s", flush=True)
    if code:
        tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-15:])
        raise WalkError(f"{block} failed; its last lines, of {log}:\n    {tail}")


def write_readers_files(clone: Path) -> None:
    """Write tickets.csv and new-tickets.csv of the demo's sentences, shuffled; my-classifier is the demo's teacher."""
    read = "import pyarrow.parquet as pq, json, sys; print(json.dumps(pq.read_table(sys.argv[1]).to_pylist()))"
    file = clone / "demo" / "data" / "movie_reviews" / "train-00000-of-00001.parquet"
    python = clone / ".venv" / "bin" / "python"  # made by `make demo`
    printed = subprocess.run([python, "-c", read, file], capture_output=True, text=True, check=True).stdout
    rows = [(row["sentence"], ("negative", "positive")[row["label"]]) for row in json.loads(printed)]
    random.Random(0).shuffle(rows)
    new = NUM_ROWS + NUM_NEW_ROWS
    for name, part in (("tickets.csv", rows[:NUM_ROWS]), ("new-tickets.csv", rows[NUM_ROWS:new])):
        with (clone / name).open("w", newline="") as opened:
            csv.writer(opened).writerows([("text", "label"), *part])
    (clone / "my-classifier").symlink_to(clone / "demo" / "run" / "teacher")
    print(f"the reader's files: {NUM_ROWS} and {NUM_NEW_ROWS} rows of the demo, and its teacher", flush=True)


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def look(block: Block, clone: Path, env: dict[str, str], out: Path) -> None:
    """Start TensorBoard as the block does, on a free port, and look at it. Raises WalkError if no chart is there."""
    (command,) = block.commands
    print(f"{block}\n    {command}", flush=True)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print("  skipped: there is no chromium; on Debian, apt-get install chromium", flush=True)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (out / "tensorboard.log").open("wb") as output:
        words = [*shlex.split(command), "--port", str(port), "--host", "127.0.0.1"]
        words[0] = shutil.which(words[0], path=env["PATH"]) or words[0]
        server = subprocess.Popen(words, cwd=clone, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_for(f"{url}data/plugins_listing", server)
            page = dump(browser, url)
            (out / "tensorboard.html").write_text(page)
            for name, tab in VIEWS.items():
                take_picture(browser, url + tab, out / f"tensorboard-{name}.png")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    runs, charts = runs_of(page), charts_of(page)
    print(f"  runs: {', '.join(runs)}\n  charts of the first view: {', '.join(charts)}", flush=True)
    if not charts:
        raise WalkError(f"TensorBoard's first view shows no chart; see {out / 'tensorboard-first.png'}")


def wait_for(url: str, server: subprocess.Popen[bytes], limit_s: float = 120) -> None:
    """Wait until a server answers. Raises WalkError if it ends or takes too long."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            time.sleep(5)  # it answers before it has read the files
            return
        except OSError:
            time.sleep(0.5)
    raise WalkError(f"tensorboard did not answer within {limit_s:.0f} s; see tensorboard.log")


def chromium(browser: str, *words: str) -> str:
    """Run headless Chromium for a page that draws itself, and return what it prints. Raises WalkError."""
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    more = ["--headless=new", "--disable-gpu", "--window-size=1600,1400", "--virtual-time-budget=20000"]
    with tempfile.TemporaryDirectory() as profile:
        try:
            done = subprocess.run(
                [browser, *root, *more, f"--user-data-dir={profile}", *words],
                capture_output=True,
                text=True,
                timeout=180,
                check=True,
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise WalkError(f"chromium failed: {error}") from error
    return done.stdout


def dump(browser: str, url: str) -> str:
    """The page as it is after its scripts have run."""
    return chromium(browser, "--dump-dom", url)


def take_picture(browser: str, url: str, file: Path) -> None:
    """Write a PNG of the page."""
    chromium(browser, f"--screenshot={file}", url)


def charts_of(page: str) -> list[str]:
    """Titles of the charts in TensorBoard's time series, in their order."""
    return [html.unescape(title) for title in re.findall(r'<tb-truncated-path[^>]*\btitle="([^"]*)"', page)]


def runs_of(page: str) -> list[str]:
    """Names of the runs beside the charts."""
    found = re.findall(r"<tb-data-table-content-cell.*?</tb-data-table-content-cell>", page, re.DOTALL)
    texts = (html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in found)
    return list(dict.fromkeys(text for text in texts if (text and not re.fullmatch(r"[-\d.e+]+", text)) or text == "."))


if __name__ == "__main__":
    raise SystemExit(main())
