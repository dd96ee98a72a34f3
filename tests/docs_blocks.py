"""The fenced blocks of the documentation, which tests/test_docs.py and tools/walk.py run.

A comment line before a block marks it:

    <!-- needs: minutes -->   takes minutes; `make walk` runs it
    <!-- needs: browser -->   a server for a browser; `make walk` opens it
    <!-- needs: hub -->       reads models or data of the hub; the test gives it tiny ones by these names
    <!-- needs: cluster -->   Slurm
    <!-- needs: gpu -->       a GPU
    <!-- needs: hours -->     hours
    <!-- file: NAME -->       the reader saves it as NAME
    <!-- output -->           what the block before it prints

Several needs have commas between them. Blocks of the language text are not for running.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
PAGES += ("benchmarks/NOTES.md", "benchmarks/README.md")
NEEDS = ("minutes", "browser", "hub", "cluster", "gpu", "hours")
LANGUAGES = ("sh", "python", "yaml", "text")
FENCED = re.compile(r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    """Of its fence."""
    language: str
    text: str
    needs: frozenset[str]
    file: str = ""
    is_output: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, continued lines joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in its order. Raises ValueError for a mark or a language that is not known."""
    text = (ROOT / page).read_text()
    blocks = []
    for found in FENCED.finditer(text):
        mark, language = found["mark"] or "", found["language"]
        line = text.count("\n", 0, found.start()) + 1 + bool(mark)
        kind, _, value = mark.partition(": ")
        needs = frozenset(value.split(", ")) if kind == "needs" else frozenset[str]()
        if kind not in ("", "needs", "file", "output") or not needs <= set(NEEDS):
            raise ValueError(f"{page}:{line}: unknown mark '{mark}'; the marks are in tests/docs_blocks.py")
        if language not in LANGUAGES:
            raise ValueError(f"{page}:{line}: language '{language}' is none of {', '.join(LANGUAGES)}")
        file = value if kind == "file" else ""
        blocks.append(Block(page, line, language, found["text"], needs, file, is_output=kind == "output"))
    return blocks
