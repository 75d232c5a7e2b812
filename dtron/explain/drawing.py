"""Pictures of a layout: inline SVG, whose colours are the page's, and a schedule in letters."""

from html import escape
from typing import Any

__all__ = ["gantt", "gantt_text", "memory", "mesh", "mesh_text", "shown_nodes", "spans", "tokens"]

MOST_NODES, MOST_LETTERS = 12, 104
CELL, ROW, WIDE = 46, 22, 900


def _svg(width: float, height: float, label: str, shapes: list[str], least: int = 0) -> str:
    style = f' style="min-width:{least}px"' if least else f' style="width:{width:.0f}px"'
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}"{style}>'
        + "".join(shapes)
        + "</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, look: str, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{look}">{title}</rect>'


def _text(x: float, y: float, text: str, look: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{look}">{escape(text)}</text>'


def shown_nodes(facts: dict[str, Any]) -> list[int]:
    """The first nodes, and those of the next ranks in each group of the rank."""
    per_node, last = facts["gpus_per_node"], -(-facts["world"] // facts["gpus_per_node"])
    wanted = {rank // per_node for d in facts["dimensions"] for rank in d["ranks"][:3]} | {facts["rank"] // per_node}
    return sorted([*wanted, *(n for n in range(last) if n not in wanted)][:MOST_NODES])


def spans(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as runs, both ends included."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def mesh_text(facts: dict[str, Any]) -> list[str]:
    """A line for each node."""
    per_node, marks = facts["gpus_per_node"], {d["name"]: "abcdefg"[i] for i, d in enumerate(facts["dimensions"])}
    lines = []
    for node in shown_nodes(facts):
        line = f"node {node:<5}"
        for rank in range(node * per_node, min((node + 1) * per_node, facts["world"])):
            shared = "".join(marks[d["name"]] for d in facts["dimensions"] if rank in d["ranks"])
            line += f"{rank:>6} {'*' if rank == facts['rank'] else shared:{len(marks)}}"
        lines.append(line.rstrip())
    legend = "".join(f", {mark}: {name}" for name, mark in marks.items())
    return [*lines, f"* rank {facts['rank']}; letters: the groups that a rank shares with it{legend}"]


def mesh(facts: dict[str, Any]) -> str:
    """A picture for each node; marks of a cell: the groups that it shares with the rank (by the page's script, any)."""
    dimensions, per_node, pictures = facts["dimensions"], facts["gpus_per_node"], []
    height = 24 + 7 * len(dimensions)
    for node in shown_nodes(facts):
        shapes = [_text(0, 12, f"node {node}", "small")]
        for i, rank in enumerate(range(node * per_node, min((node + 1) * per_node, facts["world"]))):
            x, y = i % 4 * (CELL + 4), 18 + i // 4 * (height + 4)
            me = " me" if rank == facts["rank"] else ""
            first = {d["name"]: rank - rank // d["stride"] % len(d["ranks"]) * d["stride"] for d in dimensions}
            mine = {d["name"]: d["ranks"][0] for d in dimensions}
            data = " ".join(f"{name}:{group}" for name, group in first.items())
            marks = [
                _rect(x + 4, y + 20 + 7 * j, CELL - 8, 5, f"d-{name}" + (" off" if first[name] != mine[name] else ""))
                for j, name in enumerate(first)
            ]
            cell = [_rect(x, y, CELL, height, "cell"), _text(x + CELL / 2, y + 14, f"{rank}", "mid"), *marks]
            shapes.append(f'<g class="rank{me}" data-groups="{data}">{"".join(cell)}</g>')
        rows = -(-min(per_node, facts["world"]) // 4)
        pictures.append(_svg(4 * (CELL + 4), 18 + rows * (height + 4), f"node {node}", shapes))
    return f'<div class="nodes">{"".join(pictures)}</div>'


def tokens(facts: dict[str, Any]) -> str:
    """The sequence as a strip, coloured by the cp rank that holds a part."""
    held = facts["tokens"]["held"]
    if len(held) == 1:
        return ""
    scale, shapes = WIDE / facts["seq_len"], []
    for cp_rank, part in enumerate(held):
        for first, last in part["positions"]:
            tip, width = f"cp rank {cp_rank}: tokens {first} to {last}", (last - first + 1) * scale
            shapes.append(_rect(first * scale, 0, width, 26, f"span c{cp_rank % 6}", tip))
            if width > 40:
                shapes.append(_text(first * scale + width / 2, 17, f"cp {cp_rank}", "mid ink"))
    return _svg(WIDE, 26, "tokens of a sequence by cp rank", shapes, 360)


def gantt(p: dict[str, Any]) -> str:
    """Actions of each pipeline rank in time."""
    end = max(span[-1] for span in p["spans"])
    n = max(span[0] for span in p["spans"]) + 1
    scale, shapes = (WIDE - 44) / end, [_text(0, ROW * rank + 15, f"pp {rank}", "small") for rank in range(n)]
    pp_first = {s["pp_rank"]: s["stage"] for s in reversed(p["stages"])}
    for rank, stage, kind, microbatch, start, stop in p["spans"]:
        x, width = 44 + start * scale, (stop - start) * scale
        later = " later" if stage != pp_first[rank] else ""
        tip = f"stage {stage}, {NAMES[kind]} of microbatch {microbatch}"
        shapes.append(_rect(x, ROW * rank + 2, width, ROW - 4, f"k {LOOKS[kind]}{later}", tip))
        if width > 9:
            shapes.append(_text(x + width / 2, ROW * rank + 15, str(microbatch), "mid tiny ink"))
    return _svg(WIDE, ROW * n, "pipeline schedule", shapes, 640) + _legend(
        [(LOOKS[kind], NAMES[kind]) for kind in NAMES if any(span[2] == kind for span in p["spans"])]
    )


LOOKS = {"F": "c0", "B": "c1", "I": "c1", "W": "c2"}
NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}


def _legend(entries: list[tuple[str, str]]) -> str:
    items = (
        f'<span class="key"><svg viewBox="0 0 10 10">{_rect(0, 0, 10, 10, look)}</svg>{escape(name)}</span>'
        for look, name in entries
    )
    return f'<p class="legend">{"".join(items)}</p>'


def gantt_text(p: dict[str, Any]) -> list[str]:
    """The same in letters, four for the time of a forward; dots: the rank waits."""
    lines: dict[int, list[str]] = {}
    for rank, _, kind, microbatch, start, stop in p["spans"]:
        line = lines.setdefault(rank, [])
        first, width = round(4 * start), round(4 * (stop - start))
        line += ["."] * (first - len(line))
        line += list(f"{kind}{microbatch}".ljust(width - 1, "-")[: width - 1] + " ")
    cut = [f"pp {rank:<3} {''.join(line).rstrip()}" for rank, line in sorted(lines.items())]
    return [line[:MOST_LETTERS] + ("..." if len(line) > MOST_LETTERS else "") for line in cut]


def memory(m: dict[str, Any]) -> str:
    """A bar of the peak's parts."""
    x, shapes = 0.0, []
    for i, (part, size) in enumerate(m["parts"].items()):
        width = WIDE * size / m["peak_bytes"]
        shapes.append(_rect(x, 0, width, 30, f"span c{i % 6}", part))
        x += width
    return _svg(WIDE, 30, "parts of the peak", shapes, 360) + _legend(
        [(f"c{i % 6}", p) for i, p in enumerate(m["parts"])]
    )
