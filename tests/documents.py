"""The documents as a test reads them: blocks, commands, what was shown of their output, links and anchors.

A fenced block is made of commands where its language is bash, sh or console, or where it has none and its first line is
one. In a `console` block commands stand behind `$ `, and what they printed below; `...` leaves lines or ends of lines
out. `needs=WHAT` behind the language says that a test cannot run the block, and why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AWAY = {".venv", "runs", "build", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"}
NEEDS = {
    "data": "frames of KITTI, which are not part of the repository",
    "device": "a device that SSH reaches",
    "gpu": "a GPU",
    "network": "an installation from the network",
    "time": "half an hour or more",
    "tensorrt": "files that trtexec writes",
    "secret": "a CI system and its secrets",
}
PROGRAMS = (
    "fusepress",
    "make",
    "python",
    "torchrun",
    "openssl",
    "cp",
    "ls",
    "cat",
    "echo",
    "export",
    "mkdir",
    "scp",
    "pip",
    "printf",
)
SHELLS = ("bash", "sh", "console")


@dataclass(slots=True)
class Command:
    """One command and what the document shows of its output."""

    text: str
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the document, where its first line stands.
        language: behind the fence, or empty.
        needs: what a test lacks to run it, a word of NEEDS, or empty.
    """

    path: Path
    line: int
    language: str
    needs: str
    text: str

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def is_commands(self) -> bool:
        """Whether it is to be typed into a shell."""
        first = next((line for line in self.text.splitlines() if line.strip() and not line.startswith("#")), "")
        return self.language in SHELLS or (not self.language and bare(first).split(" ")[0] in PROGRAMS)

    def commands(self) -> list[Command]:
        """Its commands, in order."""
        found: list[Command] = []
        continued = False
        for line in self.text.splitlines():
            typed = line.removeprefix("$ ") if self.language == "console" else line
            if continued:
                found[-1].text += "\n" + line
            elif self.language == "console" and not line.startswith("$ "):
                found[-1].shown.append(line)
            elif typed.strip() and not typed.startswith("#"):
                found.append(Command(bare(typed)))
            else:
                continue
            continued = line.endswith("\\")
        return found


def documents(*, all_of_them: bool = False) -> list[Path]:
    """The front page and the pages of docs/; or every page of the repository."""
    if not all_of_them:
        return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return sorted(p for p in ROOT.rglob("*.md") if not AWAY & set(p.relative_to(ROOT).parts))


def bare(command: str) -> str:
    """A command without the folder that it is installed in."""
    return command.strip().replace(".venv/bin/", "")


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = path.read_text()
    found = []
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        language, _, rest = match[1].strip().partition(" ")
        needs = [word.removeprefix("needs=") for word in rest.split() if word.startswith("needs=")]
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(path, line, language, needs[0] if needs else "", match[2]))
    return found


def without_blocks(path: Path) -> str:
    """The prose of a document."""
    return re.sub(r"^```[^\n]*\n.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What can stand behind `#` in a link to the document, as GitHub names headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", without_blocks(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def links(path: Path) -> list[tuple[str, str]]:
    """File and anchor of every link that leads to a file of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(path))
    return [(t.partition("#")[0], t.partition("#")[2]) for t in targets if "://" not in t]


def not_shown_by(shown: Sequence[str], real: str) -> list[str]:
    """Lines that a document shows and a program did not print, in that order; figures may differ, words may not."""
    printed = [masked(line) for line in real.splitlines()]
    position, missing = 0, []
    for line in shown:
        wanted, cut, _ = line.partition("...")
        wanted = masked(wanted)
        if not wanted:
            continue
        hits = [
            k for k in range(position, len(printed)) if (printed[k].startswith(wanted) if cut else printed[k] == wanted)
        ]
        if hits:
            position = hits[0] + 1
        else:
            missing.append(line)
    return missing


def masked(line: str) -> str:
    """A line without its figures, hashes, spacing and the length of its rules."""
    plain = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{6,64}\b", "#", line)
    plain = re.sub(r"[+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "#", plain)
    return " ".join(re.sub("─+", "─", plain).split())
