"""Pages as a reader meets them: links lead somewhere, the README is short, figures say where they come from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.blocks import FENCE, PAGES, ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
README = ROOT / "README.md"


def links(page: Path) -> list[str]:
    return [target for target in LINK.findall(FENCE.sub("", page.read_text())) if not target.startswith("http")]


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/results/REPORT.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_readme_is_short_and_says_what_no_gpu_confirmed() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 200
    assert "no GPU has run a training of the paper's length" in text
    assert {"docs/" + page.name for page in PAGES[1:]} <= set(re.findall(r"docs/[\w-]+\.md", text))


@pytest.mark.parametrize("page", [*PAGES, README.parent / "CHANGELOG.md"], ids=lambda p: p.name)
def test_lines_are_at_most_130_characters(page: Path) -> None:
    long = [line for line in page.read_text().splitlines() if len(line) > 130 and not line.startswith("|")]
    assert not long


def test_tables_of_the_readme_name_their_rows() -> None:
    """A marked table is made from rows; the paragraph before it links to their file, and each line has a row."""
    text = README.read_text()
    marked = re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL)
    assert len(marked) >= 2
    for name, table in marked:
        before = text[: text.index(f"<!-- {name} -->")][-900:]
        found = re.findall(r"benchmarks/results/([\w-]+)\.jsonl", before)
        assert found, f"{name}: no link to its rows"
        rows = [json.loads(line) for line in (ROOT / f"benchmarks/results/{found[-1]}.jsonl").read_text().splitlines()]
        cases = " ".join({row["case"] for row in rows})
        for case in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE):
            assert case in cases, f"{name}: no row for {case}"


def test_every_method_has_a_card_that_says_when_it_does_not_help() -> None:
    from ltfast.recipes import ALIASES, BASES, SHARPNESS_SOURCES

    text = (ROOT / "docs/methods.md").read_text()
    cards = {head: body for head, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)}
    named = {name for head in cards for name in re.findall(r"[\w-]+", head)}
    assert {*BASES, *SHARPNESS_SOURCES, *ALIASES, "gkp"} <= named
    for head, body in cards.items():
        assert "Does not help:**" in body, head
        assert re.search(r"[Cc]ost", body) or "No extra FLOPs" in body or "three forward" in body, head


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:ltfast|kernels|tests|benchmarks|docs)/[\w/.-]+\.(?:py|md|jsonl|png))`", page.read_text()
        ):
            assert (ROOT / name).exists() or "_<" in name, f"{page.name}: {name}"
