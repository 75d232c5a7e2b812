"""What `dtron plan --hardware` accepts, and what it makes of preflight's measurements."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dtron.__main__ import main
from dtron.cluster.preflight.report import SCHEMA, summarize_dimensions, summarize_ranks
from dtron.config import load
from dtron.errors import UserError
from dtron.models.families import FAMILIES
from dtron.observe.plan_hardware import FIGURES, GPUS
from dtron.plan.hardware import HARDWARE, Constants, Hardware
from dtron.plan.hardware_file import read_hardware
from dtron.plan.layout import Layout, Sizes
from dtron.plan.network import Group, message_s
from dtron.plan.timemodel import predict
from dtron.train.resolve import resolve

DEBUG = str(Path(__file__).resolve().parents[2] / "configs/debug.toml")
BYTES = 2**28
H100 = "NVIDIA H100 80GB HBM3"


def preflight(device: str = H100, dtype: str = "bfloat16", names: dict[int, list[str]] | None = None) -> dict[str, Any]:
    """The file that preflight makes of 4 ranks on 2 hosts; names: of the dimensions, by the number of their ranks."""
    hosts = ["n1", "n1", "n2", "n2"]
    rates = {"matmul_flops_per_s": 6e14, "matmul_flops_per_cpu_s": 6e14, "memory_bytes_per_s": 2e12}
    rates |= {"memory_bytes_per_cpu_s": 2e12, "memory_total_bytes": 8e10}
    facts = [{"host": host, "device": device, "threads": 1} for host in hosts]
    measured = []
    for rank in range(4):
        groups = []
        for n, dimensions in ({2: ["tp"], 4: ["world"]} if names is None else names).items():
            ranks = list(range(rank // n * n, rank // n * n + n))
            sizes = [{"bytes": size, "seconds": size / (3e11 if n == 2 else 2e10)} for size in (4, BYTES)]
            link = {"ranks": ranks[:2], "sizes": sizes}
            groups.append(
                {"names": dimensions, "ranks": ranks, "all_reduce": sizes, "all_gather": sizes, "links": [link]}
            )
        measured.append(groups)
    ranks = summarize_ranks([dict(rates) for _ in hosts], facts, dtype)
    dimensions = summarize_dimensions(measured, hosts) if measured[0] else {}
    return {"schema": SCHEMA, "device_type": "cuda", "ranks": ranks, "dimensions": dimensions}


def test_measured_rates_replace_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "preflight.json"
    file.write_text(json.dumps(preflight()))
    hw, c = read_hardware(str(file)), Constants()
    assert hw.flops == pytest.approx(6e14 / 0.8) and hw.peak_flops == HARDWARE["h100"].flops
    assert hw.memory_rate * c.memory == pytest.approx(2e12) and hw.memory_bytes == 8e10
    for group, rate in ((Group(2, 2), 3e11), (Group(4, 2), 2e10)):  # the measured gathers, but for latency
        assert message_s(BYTES, group, hw, c) == pytest.approx(BYTES / rate, rel=0.02)
    s, layout = Sizes.of(FAMILIES["llama3"]["8B"]), Layout(dp_shard=8)
    plain, measured = (predict(s, layout, 8192, one) for one in (HARDWARE["h100"], hw))
    ratio = plain.tokens_per_s / measured.tokens_per_s
    assert ratio > 1 and plain.mfu_full / measured.mfu_full == pytest.approx(ratio), "MFU is of the data sheet's peak"

    file.write_text(json.dumps(preflight(dtype="float32", names={2: ["tp"]})))
    assert main(["plan", DEBUG, "--gpus", "2", "--exact", "0", "--top", "1", "--hardware", str(file)]) == 0
    text = capsys.readouterr().out
    assert "preflight: memory_rate, memory_bytes, link_rate; of the table: flops, network_rate." in text
    file.write_text(json.dumps(preflight(names={})))
    assert read_hardware(str(file)).measured == ("flops", "memory_rate", "memory_bytes")


def test_figures_replace_the_tables(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "h200", "flops": 8e14}))
    assert (
        read_hardware(str(file)).flops == 8e14 and read_hardware(str(file)).memory_rate == HARDWARE["h200"].memory_rate
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": 2}, "its schema is 2; expected 1"),
        ({"schema": 1, "exit_code": 2}, "not a whole file of dtron preflight"),
        (preflight("cpu", "float32"), "measured on cpu, which is none of a100-40gb, a100"),
        (preflight("NVIDIA H100 PCIe"), "measured on NVIDIA H100 PCIe"),
        ({"name": "h1000"}, "expected the file of dtron preflight, or an object with name"),
        ({"name": "h100", "speed": 3}, "expected the file of dtron preflight, or an object with name"),
        ({"name": "h100", "flops": "fast"}, "flops is 'fast'; expected a number above 0"),
        ([1], "expected the file of dtron preflight"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_hardware(str(file))
    assert "\n" not in str(error.value)


def test_a_run_refuses_before_it_trains_what_the_planner_would_refuse_after(tmp_path: Path) -> None:
    """The same name or file in the same words; `dtron plan` has hardware of its own and does not look at the run's."""
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"name": "h100", "speed": 3}))
    for given, said in (("h1000", "did you mean h100"), (str(file), "any of attention, flops"), ("no.json", "no file")):
        with pytest.raises(UserError, match=said) as error:
            resolve(load(["--metrics.plan_hardware", given]), 1, "cuda")
        assert str(error.value).startswith("metrics.plan_hardware") and "\n" not in str(error.value)
    file.write_text(json.dumps(preflight("cpu", "float32", {})))
    resolve(load(["--metrics.plan_hardware", str(file)]), 1, "cpu")
    resolve(load(["--metrics.plan_hardware", H100]), 1, "cuda")
    with pytest.raises(UserError, match="it was measured on cpu"):
        resolve(load(["--metrics.plan_hardware", str(file)]), 1, "cuda")
    keys = ["--metrics.plan_hardware", "h1000", "--top", "1"]
    assert main(["plan", DEBUG, "--gpus", "1", "--exact", "0", *keys]) == 0


def test_the_table_has_what_a_run_may_name() -> None:
    assert {name: hw.flops for name, hw in HARDWARE.items()} == GPUS
    assert {*FIGURES, "name", "measured"} == {field.name for field in dataclasses.fields(Hardware)}


def test_an_unknown_name_has_a_hint() -> None:
    with pytest.raises(UserError, match="did you mean h100"):
        read_hardware("h1000")
    with pytest.raises(UserError, match="there is no file nowhere.json"):
        read_hardware("nowhere.json")
