"""One HTML page of a layout: no network, inline pictures, light and dark; without JavaScript all is there."""

from html import escape

from dtron.explain.sections import Part, Section

__all__ = ["MARK", "as_page"]

MARK = "<!-- made by dtron explain -->"
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1d2126;--soft:#5b6470;--line:#d9dde3;--card:#f5f7f9;--on:#fff;
--c0:#4c78a8;--c1:#c96a10;--c2:#3f8a3b;--c3:#9a5a92;--c4:#b3261e;--c5:#5f7f86}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e6e9ed;--soft:#9aa4b0;--line:#343b44;--card:#1d2228;
--on:#14171b;--c0:#6f9fd2;--c1:#e8974a;--c2:#6db768;--c3:#c58abc;--c4:#e5746c;--c5:#8fb3bb}}
body{margin:0 auto;max-width:1240px;padding:16px;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui}
h1{font-size:1.4rem;line-height:1.25}h3{font-size:1rem;margin:1rem 0 .2rem}p{margin:.4rem 0;max-width:80ch}
h2{font-size:1.15rem;margin:2.2rem 0 .3rem;border-top:1px solid var(--line);padding-top:1rem}
.soft{color:var(--soft);font-size:.9rem}code,pre,td{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.82rem}
code,pre{background:var(--card);padding:.1em .3em;overflow-wrap:anywhere}pre{padding:.7em;overflow-x:auto}
nav a{margin-right:1em;color:var(--c0);display:inline-block}.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse}tr.message td{background:var(--card)}th{color:var(--soft);font-size:.82rem}
th,td{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);white-space:nowrap}
svg{display:block;font:11px system-ui,sans-serif}svg text{fill:var(--ink)}svg .ink{fill:var(--on)}
svg .small{fill:var(--soft)}.mid{text-anchor:middle}.tiny{font-size:9px}.nodes{display:flex;flex-wrap:wrap;gap:14px}
.cell{fill:var(--card);stroke:var(--line)}.me .cell{stroke:var(--ink);stroke-width:2}.off{opacity:.12}
.rank{cursor:pointer}.pill,.key{display:inline-block;margin-right:.9em}
.pill{color:var(--on);padding:0 .45em;border-radius:.6em}
.key svg{display:inline-block;width:10px;height:10px;margin-right:.35em}
.span,.k{stroke:var(--bg)}.k{stroke-width:.5}.later{opacity:.65}
"""
COLORS = {"tp": 0, "cp": 1, "dp_shard_cp": 2, "pp": 3, "dp_replicate": 4, "ep": 5, "expert_fsdp": 4, "world": 5}
# A click on a rank shows its groups in place of those that are drawn.
SCRIPT = """
document.querySelectorAll('.rank').forEach(g=>g.addEventListener('click',()=>{
const mine=g.dataset.groups.split(' ');document.querySelectorAll('.rank').forEach(o=>{o.classList.toggle('me',o===g);
o.dataset.groups.split(' ').forEach((x,i)=>o.querySelectorAll('rect')[i+1]?.classList.toggle('off',x!==mine[i]))})}));
document.querySelectorAll('.hint').forEach(p=>p.hidden=false);
"""


def as_page(title: str, command: str, found: list[Section]) -> str:
    """The whole page."""
    colors = "".join(f".d-{n}{{fill:var(--c{c});background:var(--c{c})}}" for n, c in COLORS.items())
    colors += "".join(f".c{c}{{fill:var(--c{c})}}" for c in range(6))
    links = "".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(found, 1))
    body = "".join(_section(i, section) for i, section in enumerate(found, 1))
    return (
        f'<!doctype html>{MARK}<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}{colors}</style></head><body><h1>{escape(title)}</h1><p class='soft'>Made by "
        f"<code>{escape(command)}</code></p><nav>{links}</nav>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    files = f'<p class="soft">Done by <code>{escape(section.file)}</code></p>'
    parts = "".join(map(_part, section.parts))
    head = f"<h2>{number}. {escape(section.title)}</h2><p>{escape(section.text)}</p>"
    return f'<section id="s{number}">{head}{files}{parts}</section>'


def _part(part: Part) -> str:
    title = f"<h3>{escape(part.title)}</h3>" if part.title else ""
    picture = f'<div class="wide">{part.svg}</div>' if part.svg else ""
    if part.drawing and not part.svg:
        picture = f"<pre>{escape(chr(10).join(part.drawing))}</pre>"
    if "rank me" in picture:
        picture += '<p class="soft">A bar in a dimension\'s color: in the group of the framed rank.'
        picture += '<span class="hint" hidden> Click a rank to see its groups.</span></p>'
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in part.notes)
    return title + picture + (_table(part) if part.rows else "") + notes


def _table(part: Part) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in part.header)
    at = part.header.index("dimension") if "dimension" in part.header else -1
    rows = []
    for row in part.rows:
        cells = [
            f'<td><span class="pill d-{cell}">{cell}</span></td>' if i == at and cell else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        ]
        rows.append(f"<tr{' class=message' if at > 0 and row[at] else ''}>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
