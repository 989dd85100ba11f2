"""Commands and Python blocks of README.md and docs/*.md, as they are written there."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("ltfast", "python", "pytest", "torchrun", "pip")
INLINE = re.compile(r"`((?:" + "|".join(PROGRAMS) + r") [^`]+)`")


class Block(NamedTuple):
    """A fenced block: page, line of its first line of text, language, text."""

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """One command: where it stands, and its words with optional parts kept and one alternative chosen."""

    where: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page."""
    text = page.read_text()
    return [Block(page.name, text[: m.start()].count("\n") + 2, m.group(1), m.group(2)) for m in FENCE.finditer(text)]


def commands() -> list[Command]:
    """Every command of every page, each once: lines of bash blocks, and inline code that starts with a program's name."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        lines: list[tuple[int, str]] = []
        for block in blocks(page):
            if block.language == "bash" and not is_script(block):
                lines += logical_lines(block)
        text = FENCE.sub(lambda m: "\n" * m.group(0).count("\n"), page.read_text())
        lines += [(text[: m.start()].count("\n") + 1, m.group(1).replace("\n", " ")) for m in INLINE.finditer(text)]
        for line, command in lines:
            for words in variants(command):
                found.setdefault(words, Command(f"{page.name}:{line}", words))
    return list(found.values())


def is_script(block: Block) -> bool:
    """True for a whole shell script (it is run as one)."""
    return block.text.startswith("#!")


def logical_lines(block: Block) -> list[tuple[int, str]]:
    """(line, command): lines joined at backslashes, split at &&, without comments and blank lines."""
    result, joined, start = [], "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        start = start if joined else number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(joined, comments=True)
        parts = [list(p) for k, p in itertools.groupby(words, lambda w: w == "&&") if not k]
        result += [(start, shlex.join(part)) for part in parts]
        joined = ""
    return result


def variants(command: str) -> list[tuple[str, ...]]:
    """Words of a command, optional parts in, one list for each of its alternatives a|b|c; '...' is left out."""
    words = shlex.split(command.replace("...", ""))
    words = [w if w.count("[") == w.count("]") and not w.startswith("[") else w.strip("[]") for w in words]
    while words and "=" in words[0] and not words[0].startswith("-"):
        words.pop(0)  # environment of the command
    return list(itertools.product(*(word.split("|") for word in words if word)))
