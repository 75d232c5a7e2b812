"""What share of the wall time goes into useful steps, by how often a run saves and how fast it restarts.

    python scripts/bench/goodput.py [--gpus 16384] [--stall-s 10] [--write-s 60] [--svg FILE.svg]

The default rate of failures is that of Llama 3: 466 interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of
Models, section 3.3.4, arXiv:2407.21783); it grows with the number of GPUs. Failures come independently of each other
and of what the run does, also during a restart, which then starts again. A save stops training for the stall; written
meanwhile, it is whole so much later, and a failure before that falls back to the one before. A restart is all from the
failure to the next step: noticing, starting, loading. Nothing else is counted: no data waits, no validation.

Prints a Markdown table by the closed form (`goodput`), checked against a simulation of single failures (`simulate`).
"""

import argparse
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

GPUS = 16384
MTBF_HOURS = 54 * 24 / 466
TARGET = 0.9
INTERVALS_MIN = (1.0, 2.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0)
RESTARTS_MIN = (0.5, 1.0, 2.0, 5.0, 8.0, 10.0, 15.0)


class Run(NamedTuple):
    """All in seconds. mtbf_s: mean time between failures of the whole run."""

    mtbf_s: float
    stall_s: float
    write_s: float


def goodput(run: Run, interval_s: float, restart_s: float) -> float:
    """Share of the wall time in steps that were never lost; interval_s: of training between two saves.

    From one whole save to the next a run needs w = interval + stall without a failure; after one, w + write, as its
    steps begin at the save and not where that was whole. With failures of rate 1/M, also during a restart R, that
    takes M exp((R + write) / M) (exp(w / M) - 1) on average: Daly's model (doi:10.1016/j.future.2004.11.016), in
    which the time to write a save counts like restart time.
    """
    mtbf_s, stall_s, write_s = run
    return interval_s / (
        mtbf_s * math.exp((restart_s + write_s) / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    )


def longest_restart_s(run: Run, interval_s: float) -> float:
    """The restart time at which the goodput is still TARGET; negative: there is none."""
    return run.mtbf_s * math.log(goodput(run, interval_s, 0.0) / TARGET)


def young_daly_s(run: Run) -> float:
    """The best interval, to first order (doi:10.1145/361147.361115); the restart time has no part in it."""
    return math.sqrt(2 * run.stall_s * run.mtbf_s)


def simulate(run: Run, interval_s: float, restart_s: float, failures: int, seed: int) -> float:
    """The goodput of one run with so many failures, each walked through save by save."""
    rng = random.Random(seed)
    wall_s = useful_s = 0.0
    for _ in range(failures):
        failed_s = rng.expovariate(1 / run.mtbf_s)  # after the failure before
        saved_s = restart_s + interval_s + run.stall_s
        while saved_s + run.write_s <= failed_s:
            useful_s += interval_s
            saved_s += interval_s + run.stall_s
        wall_s += failed_s
    return useful_s / wall_s


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.3g} min"


def table(run: Run, intervals_s: list[float], restarts_s: list[float]) -> str:
    """Markdown: goodput in %, bold where it is TARGET or more, and the longest restart time that gives it."""
    heads = ["saved every", *(f"restart {minutes(restart_s)}" for restart_s in restarts_s), f"restart for {TARGET:.0%}"]
    lines = [heads, ["---"] * len(heads)]
    for interval_s in intervals_s:
        shares = [goodput(run, interval_s, restart_s) for restart_s in restarts_s]
        longest_s = longest_restart_s(run, interval_s)
        reached = f"up to {minutes(longest_s)}" if longest_s > 0 else "none"
        cells = [f"**{100 * share:.1f}**" if share >= TARGET else f"{100 * share:.1f}" for share in shares]
        lines.append([minutes(interval_s), *cells, reached])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(run: Run, gpus: int) -> tuple[str, str]:
    """The line before the table and the one after it."""
    best_s = young_daly_s(run)
    longest_s = longest_restart_s(run, best_s)
    reached = f"It gives {TARGET:.0%} if a restart takes at most {minutes(longest_s)}."
    if longest_s <= 0:
        reached = f"It does not give {TARGET:.0%}, however fast the restart."
    return (
        f"{gpus:,} GPUs, a failure every {minutes(run.mtbf_s)}; a save stalls {minutes(run.stall_s)} and is whole "
        f"{minutes(run.write_s)} later. Goodput in %:",
        f"Best interval, by Young and Daly sqrt(2 x stall x MTBF): {minutes(best_s)}. {reached}",
    )


def svg(run: Run, gpus: int, intervals_s: list[float], restarts_s: list[float]) -> str:
    """The table as a heat map; cells of TARGET or more are framed."""
    left, top, width, height = 96, 96, 76, 34
    right, bottom = left + width * len(restarts_s), top + height * len(intervals_s)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:g}" y="{y:g}" {more}>{words}</text>'

    title = f"Goodput (%): {gpus:,} GPUs, a failure every {minutes(run.mtbf_s)}"
    given = f"a save stalls {minutes(run.stall_s)}, is whole {minutes(run.write_s)} later; framed: {TARGET:.0%} or more"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 24} {bottom + 16}" width="{right + 24}" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(24, 24, title, 'font-size="15" font-weight="bold" text-anchor="start"'),
        text(24, 44, given, 'text-anchor="start" fill="#555"'),
        text(24, top - 10, "save every", 'text-anchor="start" fill="#555"'),
        text(right, 66, "restart takes", 'text-anchor="end" fill="#555"'),
    ]
    for column, restart_s in enumerate(restarts_s):
        parts.append(text(left + width * (column + 0.5), top - 8, minutes(restart_s)))
    for line, interval_s in enumerate(intervals_s):
        y = top + height * line
        parts.append(text(left - 8, y + 22, minutes(interval_s), 'text-anchor="end"'))
        for column, restart_s in enumerate(restarts_s):
            x, share = left + width * column, goodput(run, interval_s, restart_s)
            depth = min(1.0, max(0.0, 2 * share - 1))  # from white at 50% to dark blue at 100%
            red, green, blue = (round(255 + depth * (dark - 255)) for dark in (8, 72, 140))
            frame = 'stroke="#e66100" stroke-width="2.5"' if share >= TARGET else ""
            size = f'x="{x + 2}" y="{y + 2}" width="{width - 4}" height="{height - 4}"'
            parts.append(f'<rect {size} fill="rgb({red},{green},{blue})" {frame}/>')
            fill = "white" if depth > 0.5 else "black"
            parts.append(text(x + width / 2, y + 22, f"{100 * share:.1f}", f'fill="{fill}"'))
    return "\n".join([*parts, "</svg>\n"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=GPUS)
    parser.add_argument(
        "--mtbf-hours", type=float, default=MTBF_HOURS, help=f"between failures on {GPUS} GPUs (default: Llama 3's)"
    )
    parser.add_argument("--stall-s", type=float, default=10.0, help="a save stops training; a run's checkpoint_stall_s")
    parser.add_argument("--write-s", type=float, default=60.0, help="from then until the save is whole; 0: synchronous")
    parser.add_argument("--intervals-min", type=float, nargs="+", default=INTERVALS_MIN, metavar="MINUTES")
    parser.add_argument("--restarts-min", type=float, nargs="+", default=RESTARTS_MIN, metavar="MINUTES")
    parser.add_argument("--failures", type=int, default=4000, help="simulated for each cell of the table")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the table as a heat map")
    given = parser.parse_args()
    if min(given.gpus, given.mtbf_hours, given.stall_s, given.failures, *given.intervals_min) <= 0:
        parser.error("--gpus, --mtbf-hours, --stall-s, --failures and --intervals-min must be above 0")
    if min(given.write_s, *given.restarts_min) < 0:
        parser.error("--write-s and --restarts-min must not be below 0")
    if given.write_s > 60 * min(given.intervals_min):
        parser.error(
            f"--write-s {given.write_s:g} is longer than the shortest interval, {60 * min(given.intervals_min):g} s: "
            "a save that is due while the one before is written waits for it, which is not simulated"
        )
    return given


def main() -> None:
    given = parse()
    run = Run(3600 * given.mtbf_hours * GPUS / given.gpus, given.stall_s, given.write_s)
    intervals_s = [60 * interval for interval in given.intervals_min]
    restarts_s = [60 * restart for restart in given.restarts_min]
    before, after = summary(run, given.gpus)
    print(f"{before}\n\n{table(run, intervals_s, restarts_s)}\n\n{after}")
    cells = [(interval_s, restart_s) for interval_s in intervals_s for restart_s in restarts_s]
    off = max(abs(simulate(run, *cell, given.failures, given.seed) - goodput(run, *cell)) for cell in cells)
    print(f"Simulated failures, {given.failures:,} a cell: {100 * off:.2f} points off at most.")
    if given.svg:
        try:
            given.svg.write_text(svg(run, given.gpus, intervals_s, restarts_s))
        except OSError as error:
            sys.exit(f"error: --svg: {error}")


if __name__ == "__main__":
    main()
