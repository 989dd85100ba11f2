"""The page: one self-contained HTML file. No network, no external script; pictures are inline PNGs.

The one script checks that every picture was decoded (data-figures, data-broken and data-errors on <html>) and lets a
click enlarge it; without scripts the page reads the same.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ltfast.report.style import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#222;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header,nav{max-width:1076px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:20px;margin:44px 0 8px;padding-top:14px;border-top:2px solid #222}
h3{font-size:16px;margin:28px 0 4px}
p{margin:6px 0;max-width:78ch}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;padding-top:10px;padding-bottom:6px;font-size:14px}
nav a{color:#0072B2;white-space:nowrap}
figure{margin:6px 0 4px}
figure img{max-width:100%;height:auto;display:block;cursor:zoom-in}
figcaption{font-size:14px;color:#444;max-width:92ch;margin-top:4px}
.missing{font-size:14px;color:#555;border-left:3px solid #999;padding-left:10px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;margin:8px 0}
th,td{padding:3px 10px;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}
th{border-bottom:1.5px solid #222;font-weight:600;vertical-align:bottom}
details{margin:6px 0;font-size:14px}
summary{cursor:pointer;color:#0072B2}
dialog{border:0;padding:0;max-width:98vw;max-height:98vh;background:#fff}
dialog img{max-width:98vw;max-height:96vh;display:block;cursor:zoom-out}
dialog::backdrop{background:rgba(0,0,0,.6)}
footer{max-width:1080px;margin:40px auto;padding:0 24px;font-size:13px;color:#555}
@media print{nav,dialog{display:none}body{font-size:12px}.wide{overflow-x:visible}table{font-size:10.5px}th,td{padding:3px 5px}}
@media print{h2{break-after:avoid}section.item{break-inside:avoid}}
"""

SCRIPT = """
const root=document.documentElement;root.dataset.errors=0;
addEventListener("error",()=>root.dataset.errors=+root.dataset.errors+1);
addEventListener("load",()=>{
  const all=[...document.querySelectorAll("figure img")];
  root.dataset.figures=all.filter(i=>i.complete&&i.naturalWidth>0).length;
  root.dataset.broken=all.length-root.dataset.figures;
  const box=document.querySelector("dialog"),big=box.querySelector("img");
  all.forEach(i=>i.addEventListener("click",()=>{big.src=i.src;big.alt=i.alt;box.showModal()}));
  box.addEventListener("click",()=>box.close());
});
"""


class Entry(NamedTuple):
    """One run's part in a figure: its place among the report's runs (its colour and marker), name and numbers."""

    place: int
    name: str
    data: Any


@dataclass
class Table:
    """A small table: column heads and rows of cells (numbers are formatted by `cell`)."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Item:
    """One entry of the report.

    Attributes:
        id: fixed name, also of the PNG files. section, title, caption: text. figures: (what it shows, Figure), usually one.
        missing: one line for each run that lacks it. table: its numbers, folded away. data: JSON-able numbers.
    """

    id: str
    section: str
    title: str
    caption: str = ""
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    table: Table | None = None
    data: dict[str, Any] = field(default_factory=dict)


def cell(value: Any) -> str:
    """A table cell: floats with four significant digits, a dash for what is not there."""
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return "-" if number != number else f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"
    if value is None:
        return "-"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def render_table(table: Table) -> str:
    """HTML of a table."""
    head = "".join(f"<th>{html.escape(str(h))}</th>" for h in table.head)
    rows = ["".join(f"<td>{html.escape(cell(v))}</td>" for v in row) for row in table.rows]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def render_item(item: Item, pictures: Sequence[tuple[str, bytes]]) -> str:
    """HTML of an entry; pictures: (what it shows, PNG bytes), as many as it has figures."""
    parts = [f'<section class="item" id="{item.id}"><h3>{html.escape(item.title)}</h3>']
    for text, png in pictures:
        alt = html.escape(f"{item.title}: {text}" if text else item.title, quote=True)
        source = base64.b64encode(png).decode("ascii")
        width = int.from_bytes(png[16:20], "big") * 96 // DPI  # PNG header: width in pixels
        parts.append(f'<figure><img alt="{alt}" width="{width}" src="data:image/png;base64,{source}"></figure>')
    if item.caption and (pictures or (item.table and item.table.rows)):
        parts.append(f"<figcaption>{html.escape(item.caption)}</figcaption>")
    parts += [f'<p class="missing">{html.escape(line)}</p>' for line in item.missing]
    if item.table is not None and item.table.rows:
        table = render_table(item.table)
        parts.append(f"<details><summary>numbers</summary>{table}</details>" if pictures else table)
    return "".join([*parts, "</section>"])


def render_page(title: str, lead: Sequence[str], blocks: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole page; lead: paragraphs; blocks: (section heading, HTML of its entries)."""
    anchors = [(heading, heading.lower().replace(" ", "-")) for heading, _ in blocks]
    opening = "".join(f"<p>{html.escape(text)}</p>" for text in lead)
    nav = "".join(f'<a href="#s-{anchor}">{html.escape(heading)}</a>' for heading, anchor in anchors)
    body = "".join(
        f'<h2 id="s-{anchor}">{html.escape(heading)}</h2>{content}'
        for (heading, content), (_, anchor) in zip(blocks, anchors, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><header><h1>{html.escape(title)}</h1>{opening}</header>"
        f'<nav>{nav}</nav><main>{body}</main><footer>{html.escape(footer)}</footer><dialog><img alt=""></dialog>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )
