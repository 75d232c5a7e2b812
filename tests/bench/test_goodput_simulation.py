"""scripts/bench/goodput.py: its formula and its simulation agree, and the page shows what it prints."""

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "goodput.py"
spec = importlib.util.spec_from_file_location("bench_goodput", SCRIPT)
assert spec and spec.loader
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

LLAMA3 = bench.Run(54 * 86400 / 466, 10.0, 60.0)
INTERVALS_S, RESTARTS_S = [60 * t for t in bench.INTERVALS_MIN], [60 * t for t in bench.RESTARTS_MIN]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("mtbf_s", "stall_s", "write_s", "interval_s", "restart_s"),
    [
        (LLAMA3.mtbf_s, 10, 60, 450, 300),
        (3600, 60, 0, 900, 0),
        (3600, 60, 600, 900, 0),
        (3600, 60, 0, 900, 600),
        (600, 30, 120, 200, 400),
        (600, 30, 0, 1200, 300),
    ],
)
def test_the_formula_is_what_happens(
    mtbf_s: float, stall_s: float, write_s: float, interval_s: float, restart_s: float
) -> None:
    model = bench.Run(mtbf_s, stall_s, write_s)
    simulated = bench.simulate(model, interval_s, restart_s, 100_000, seed=1)
    assert bench.goodput(model, interval_s, restart_s) == pytest.approx(simulated, abs=0.005)


def test_the_simulation_is_seeded() -> None:
    first, again, other = (bench.simulate(LLAMA3, 450.0, 300.0, 100, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_simulation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures every 1,000 s, a restart of 100 s: save n is whole at 100 + n x (200 + 10) + 50, the fourth at 990 s."""
    monkeypatch.setattr(bench.random.Random, "expovariate", lambda self, rate: 1 / rate)
    assert bench.simulate(bench.Run(1000.0, 10.0, 50.0), 200.0, 100.0, 3, seed=0) == 0.8
    assert bench.simulate(bench.Run(989.0, 10.0, 50.0), 200.0, 100.0, 3, seed=0) == pytest.approx(600 / 989)


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_the_longest_restart_gives_just_the_target(interval_s: float) -> None:
    longest_s = bench.longest_restart_s(LLAMA3, interval_s)
    if longest_s > 0:
        assert bench.goodput(LLAMA3, interval_s, longest_s) == pytest.approx(0.9)
    else:
        assert bench.goodput(LLAMA3, interval_s, 0.0) < 0.9


def test_young_and_daly_is_close_to_the_best_interval() -> None:
    young_daly_s = bench.young_daly_s(LLAMA3)
    best_s = max(range(10, 5000), key=lambda interval_s: bench.goodput(LLAMA3, interval_s, 300.0))
    assert young_daly_s == pytest.approx(best_s, rel=0.05)
    assert bench.goodput(LLAMA3, young_daly_s, 300.0) == pytest.approx(bench.goodput(LLAMA3, best_s, 300.0), abs=1e-4)


def test_the_page_shows_what_the_script_says() -> None:
    page = (ROOT / "docs" / "dashboard.md").read_text()
    before, after = bench.summary(LLAMA3, bench.GPUS)
    for text in (before, bench.table(LLAMA3, INTERVALS_S, RESTARTS_S), after):
        assert text in page, "docs/dashboard.md is out of date: run scripts/bench/goodput.py"
    picture = (ROOT / "docs" / "img" / "goodput.svg").read_text()
    assert picture == bench.svg(LLAMA3, bench.GPUS, INTERVALS_S, RESTARTS_S), "run it with --svg docs/img/goodput.svg"


def test_the_command_line(tmp_path: Path) -> None:
    options = ["--gpus", "32768", "--stall-s", "5", "--write-s", "0", "--failures", "500"]
    chosen = ["--intervals-min", "3", "90", "--restarts-min", "0", "4", "9", "--svg", str(tmp_path / "map.svg")]
    done = run(*options, *chosen)
    assert done.returncode == 0, done.stderr
    first, _, head, _, often, seldom, _, best, simulated = done.stdout.splitlines()
    assert first.startswith("32,768 GPUs, a failure every 83.4 min; a save stalls 5 s and is whole 0 s later.")
    assert head == "| saved every | restart 0 s | restart 4 min | restart 9 min | restart for 90% |"
    assert often.startswith("| 3 min | **95.5** | **91.0** | 85.7 | up to 4.9") and seldom.endswith("| none |")
    assert "3.73 min. It gives 90% if a restart takes at most" in best
    assert float(simulated.split(": ")[1].split()[0]) < 3.0
    elements = [*ElementTree.parse(tmp_path / "map.svg").iter()]
    rects = [element for element in elements if element.tag.endswith("rect")]
    assert len(rects) == 1 + 6 and sum("stroke" in rect.attrib for rect in rects) == 2, "two cells are 90% or more"
    assert {"95.5", "91.0", "85.7"} <= {element.text for element in elements}


def test_a_rate_too_high_is_said() -> None:
    done = run("--gpus", "1000000", "--failures", "10", "--intervals-min", "1")
    assert done.stdout.splitlines()[-2].endswith("It does not give 90%, however fast the restart.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "must be above 0"),
        (("--restarts-min", "-1"), "must not be below 0"),
        (("--write-s", "90"), "longer than the shortest interval, 60 s"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr
