"""What `dtron explain` prints and writes."""

import argparse
import json
import shlex
import textwrap
from pathlib import Path

from dtron.config import read
from dtron.errors import UserError
from dtron.explain.facts import explain, setup_of
from dtron.explain.page import MARK, as_page
from dtron.explain.sections import Section, sections
from dtron.mesh import fewest_ranks

__all__ = ["as_text", "main"]

WIDTH = 118  # of text; a line of a table may be longer


def main(given: argparse.Namespace, keys: list[str]) -> None:
    """Run the command. UserError for a layout that is not legal, as train.py's, and for a file that is not ours."""
    out = Path(given.out) if given.out else None
    if given.gpus_per_node < 1 or (given.gpus is not None and given.gpus < 1):
        raise UserError("--gpus and --gpus-per-node must be 1 or more")
    if out and out.exists() and not given.force and MARK not in out.read_bytes()[:200].decode(errors="replace"):
        raise UserError(f"--out {out} exists and is no page of dtron explain: name another file, or add --force")
    reading = read(["--job.config_file", given.config, *keys])
    world = given.gpus or fewest_ranks(reading.config.parallelism)
    facts = explain(setup_of(reading.config, world, reading.mistakes), given.rank, given.gpus_per_node)
    layout = shlex.join([given.config, "--gpus", str(world), *keys])
    found = sections(facts, f"dtron verify {layout}")
    title = f"{facts['model']} on {facts['world']:,} rank{'s' * (facts['world'] > 1)}: {facts['layout']}"
    if out:
        out.write_text(as_page(title, f"dtron explain {layout}", found))
    if given.json:
        print(json.dumps(facts, indent=1))
    elif out:
        print(f"written to {out}: open it in a browser")
    else:
        print(as_text(title, found))


def as_text(title: str, found: list[Section]) -> str:
    """For a terminal."""
    lines = [title, "=" * min(len(title), WIDTH)]
    for number, section in enumerate(found, 1):
        lines += ["", f"{number}. {section.title}", *_wrapped(f"{section.text} [{section.file}]")]
        for part in section.parts:
            lines += ["", *([part.title] if part.title else [])]
            if part.drawing:
                lines += part.drawing
            if part.rows:
                rows = [part.header, *part.rows]
                widths = [max(len(row[i]) for row in rows) for i in range(len(part.header))]
                lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
            lines += [line for note in part.notes for line in _wrapped(note)]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)
