"""What is made of the ranks' figures: the JSON, warnings about what is slow, and a readable table."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from dtron.cluster.preflight.facts import describe_ranks, format_hosts
from dtron.cluster.preflight.measure import OPS, bus_factor
from dtron.observe.console import human_bytes
from dtron.observe.device import peak_flops_per_s

__all__ = ["SCHEMA", "find_warnings", "summarize_dimensions", "summarize_ranks", "table", "upper_median"]

SCHEMA = 1  # version of the JSON; a reader rejects others
# A rate below this share of the upper median is slow. On CPUs rates per CPU second are compared: of four equal ranks on
# two cores the lowest had 0.18 to 0.87 of the upper median by the wall clock, and 0.89 or more of it per CPU second.
SLOW_RATE = {"cuda": 0.8, "cpu": 0.7}
SLOW_LINK = {"cuda": 0.7, "cpu": 0.25}  # of two groups of such ranks the slower had as little as 0.44 of the faster
SLOW_DISK = 0.5
LOW_MEMORY = 0.9  # share of the other GPUs' free memory: below it another process uses some
SKEW_S = 1.0  # largest difference between clocks, beyond the uncertainty


def upper_median(rates: Iterable[float]) -> float:
    """Of two, the better one, so that half of the ranks may be slow."""
    return statistics.median_high(rates)


# --- the figures


def summarize_ranks(measured: list[dict[str, Any]], facts: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """The JSON's `ranks`. measured: matmul_flops_per_s, memory_bytes_per_s and more, per rank."""
    found = []
    for rank, (each, fact) in enumerate(zip(measured, facts, strict=True)):
        peak = peak_flops_per_s(fact["device"]) if dtype == "bfloat16" else None
        share = None if peak is None else each["matmul_flops_per_s"] / peak
        who = {"rank": rank, "host": fact["host"], "device": fact["device"], "threads": fact["threads"]}
        cores = each["matmul_flops_per_s"] / each["matmul_flops_per_cpu_s"] / fact["threads"]
        shares = {"matmul_share_of_peak": share, "cpu_share": cores if fact["device"] == "cpu" else None}
        found.append(who | {"matmul_dtype": dtype} | shares | each)
    return found


def summarize_dimensions(measured: list[list[dict[str, Any]]], hosts: list[str]) -> dict[str, Any]:
    """The JSON's `dimensions`, by name. measured: per rank, its figures in each of its groups."""
    found: dict[str, Any] = {}
    for i, first in enumerate(measured[0]):
        of_ranks = [each[i] for each in measured]
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for each in of_ranks:
            groups.setdefault(tuple(each["ranks"]), []).append(each)
        degree = len(first["ranks"])
        entry: dict[str, Any] = {"degree": degree, "groups": [list(ranks) for ranks in groups]}
        entry |= {op: _collective(op, degree, [*groups.values()]) for op in OPS}
        entry["send_recv"] = _links(of_ranks, hosts)
        found |= {name: entry for name in first["names"]}
    return found


def _collective(op: str, degree: int, groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """latency_s and sizes; a group's seconds are its slowest rank's, a dimension's the median over its groups."""
    sizes = []
    for k, size in enumerate(groups[0][0][op]):
        seconds = [max(rank[op][k]["seconds"] for rank in group) for group in groups]
        sizes.append(_size(op, degree, size["bytes"], seconds) | {"seconds_of_groups": seconds})
    return {"latency_s": sizes[0]["seconds"], "sizes": sizes}


def _size(op: str, degree: int, count: int, seconds: list[float]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {
        "bytes": count,
        "seconds": middle,
        "slowest_seconds": max(seconds),
        "bytes_per_s": count / middle,
        "bus_bytes_per_s": bus_factor(op, degree) * count / middle,
    }


def _links(of_ranks: list[dict[str, Any]], hosts: list[str]) -> dict[str, Any]:
    """As for a collective, and every link with the slower figures of its two ends."""
    ends: dict[tuple[int, int], list[list[dict[str, float]]]] = {}
    for each in of_ranks:
        for link in each["links"]:
            ends.setdefault(tuple(link["ranks"]), []).append(link["sizes"])
    links, sizes = [], []
    for (a, b), both in sorted(ends.items()):
        seconds = [max(end[k]["seconds"] for end in both) for k in range(len(both[0]))]
        link = {"ranks": [a, b], "hosts": [hosts[a], hosts[b]], "latency_s": seconds[0], "seconds": seconds}
        links.append(link | {"bytes": both[0][-1]["bytes"], "bytes_per_s": both[0][-1]["bytes"] / seconds[-1]})
    # Some rounds, and so links, may have fewer sizes than others.
    for k in range(min(len(link["seconds"]) for link in links)):
        count = next(iter(ends.values()))[0][k]["bytes"]
        sizes.append(_size("send_recv", 2, int(count), [link["seconds"][k] for link in links]))
    return {"latency_s": sizes[0]["seconds"], "sizes": sizes, "links": links}


# --- warnings


def find_warnings(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """kind, ranks, hosts and text of every problem that does not keep the ranks from training."""
    kind, hosts = figures["device_type"], [rank["host"] for rank in figures["ranks"]]
    found = []
    per, unit = ("per_cpu_s", " per CPU second") if kind == "cpu" else ("per_s", "")
    found += _slow_ranks(figures, "matmul", f"matmul_flops_{per}", SLOW_RATE[kind], lambda rate: _flops(rate) + unit)
    found += _slow_ranks(figures, "memory", f"memory_bytes_{per}", SLOW_RATE[kind], lambda rate: _rate(rate) + unit)
    if kind == "cuda":
        found += _slow_ranks(figures, "free memory", "memory_free_bytes", LOW_MEMORY, human_bytes)
    done: set[int] = set()
    for name, dimension in figures["dimensions"].items():
        if id(dimension) not in done:  # two names of one dimension
            done.add(id(dimension))
            found += _slow_groups(name, dimension, hosts, SLOW_LINK[kind])
            found += _slow_links(name, dimension["send_recv"]["links"], hosts, SLOW_LINK[kind])
    return found + _machine_warnings(figures)


def _warning(kind: str, ranks: list[int], hosts: list[str], text: str) -> dict[str, Any]:
    return {"kind": kind, "ranks": ranks, "hosts": list(dict.fromkeys(hosts[rank] for rank in ranks)), "text": text}


def _slow_ranks(
    figures: dict[str, Any], what: str, key: str, limit: float, shown: Callable[[float], str]
) -> list[dict[str, Any]]:
    rates = [rank[key] for rank in figures["ranks"]]
    hosts, usual = [rank["host"] for rank in figures["ranks"]], upper_median(rates)
    slow = [rank for rank, rate in enumerate(rates) if rate < limit * usual]
    if not slow:
        return []
    least = min(rates[rank] for rank in slow)
    text = f"{what}: {describe_ranks(slow, hosts)}, {shown(least)} at worst, the median is {shown(usual)}"
    return [_warning(what, slow, hosts, text)]


def _slow_groups(name: str, dimension: dict[str, Any], hosts: list[str], limit: float) -> list[dict[str, Any]]:
    """Groups within one host are compared with each other, and so are those that span several."""
    found, groups = [], dimension["groups"]
    for op in OPS:
        largest = dimension[op]["sizes"][-1]
        factor = bus_factor(op, dimension["degree"]) * largest["bytes"]
        for spans in (False, True):
            alike = [i for i, ranks in enumerate(groups) if (len({hosts[rank] for rank in ranks}) > 1) == spans]
            rates = {i: factor / largest["seconds_of_groups"][i] for i in alike}
            for i, rate in rates.items():
                if rate < limit * (usual := upper_median(rates.values())):
                    who = describe_ranks(groups[i], hosts)
                    text = f"{op} in {name}: {who} {_rate(rate)}, the median is {_rate(usual)}"
                    found.append(_warning(f"{op} in {name}", groups[i], hosts, text))
    return found


def _slow_links(name: str, links: list[dict[str, Any]], hosts: list[str], limit: float) -> list[dict[str, Any]]:
    """Links slower than the upper median of the ranks' best links; a rank whose links are all slow is named instead.

    The best link per rank, because in a small ring most links are those of one bad machine.
    """
    found = []
    for across in (False, True):
        alike = [link for link in links if (link["hosts"][0] != link["hosts"][1]) == across]
        of_rank: dict[int, list[dict[str, Any]]] = {}
        for link in alike:
            for rank in link["ranks"]:
                of_rank.setdefault(rank, []).append(link)
        if not alike:
            continue
        usual = upper_median(max(link["bytes_per_s"] for link in its) for its in of_rank.values())
        slow = [link for link in alike if link["bytes_per_s"] < limit * usual]
        bad = [rank for rank, its in of_rank.items() if len(its) > 1 and all(link in slow for link in its)]
        what = f"send/recv in {name}"
        if bad:
            best = max(link["bytes_per_s"] for rank in bad for link in of_rank[rank])
            who = f"every link of {describe_ranks(sorted(bad), hosts)}"
            text = f"{what}: {who}, {_rate(best)} at best, the median is {_rate(usual)}"
            found.append(_warning(what, sorted(bad), hosts, text))
        for link in slow:
            if not set(link["ranks"]) & set(bad):
                (a, b), (there, here) = link["ranks"], link["hosts"]
                between = f"between rank {a} ({there}) and rank {b} ({here})"
                text = f"{what}: the link {between}, {_rate(link['bytes_per_s'])}, the median is {_rate(usual)}"
                found.append(_warning(what, [a, b], hosts, text))
    return found


def _machine_warnings(figures: dict[str, Any]) -> list[dict[str, Any]]:
    machines, hosts = figures["machines"], [rank["host"] for rank in figures["ranks"]]
    found = []
    for machine in machines:
        if abs(skew := machine["clock_skew_s"]) - machine["clock_uncertainty_s"] > SKEW_S:
            ahead = "ahead of" if skew > 0 else "behind"
            text = (
                f"clock: {machine['host']} is {abs(skew):.3f} s {ahead} {machines[0]['host']}; synchronize it with NTP"
            )
            found.append(_warning("clock", machine["ranks"], hosts, text))
    written = [machine["disk_write_bytes_per_s"] for machine in machines]
    if not any(rate is None for rate in written):
        usual = upper_median(written)
        for machine, rate in zip(machines, written, strict=True):
            if rate < SLOW_DISK * usual:
                where = f"to {figures['disk']['folder']}"
                text = f"disk: {machine['host']} writes {_rate(rate)} {where}, the median is {_rate(usual)}"
                found.append(_warning("disk", machine["ranks"], hosts, text))
    if not figures["disk"]["shared"]:
        ranks = [rank for machine in machines if not machine["disk_sees_rank_0"] for rank in machine["ranks"]]
        text = (
            f"disk: what rank 0 writes to {figures['disk']['folder']} is not visible on "
            f"{format_hosts(ranks, hosts)}; checkpoints need one folder that all machines share"
        )
        found.append(_warning("disk not shared", ranks, hosts, text))
    return found


# --- the table


def table(figures: dict[str, Any]) -> str:
    """The text that rank 0 prints."""
    versions, ranks = figures["versions"], figures["ranks"]
    hosts = [rank["host"] for rank in ranks]
    machines = f"{len(figures['machines'])} machine{'s' if len(figures['machines']) > 1 else ''}"
    lines = [
        f"preflight of {figures['layout']}: {len(ranks)} x {ranks[0]['device']} on {machines}, "
        f"torch {versions['torch']}, {figures['took_s']:.1f} s",
        "",
        f"{'per rank':<14}{'median':>16}{'lowest':>16}",
        _rank_row(f"matmul {ranks[0]['matmul_dtype']}", ranks, "matmul_flops_per_s", hosts, _flops),
        _rank_row("memory copy", ranks, "memory_bytes_per_s", hosts, _rate),
    ]
    if figures["device_type"] == "cpu":
        lines.append(_rank_row("share of cores", ranks, "cpu_share", hosts, "{:.0%}".format))
    elif ranks[0]["matmul_share_of_peak"] is not None:
        lines.append(_rank_row("share of peak", ranks, "matmul_share_of_peak", hosts, "{:.1%}".format))
    if figures["dimensions"]:
        lines += [
            "",
            f"{'dimension':<14}{'groups':>8}{'':3}{'what':<12}{'latency':>10}{'bus bandwidth':>16}{'slowest':>14}",
        ]
        lines += [row for name, dimension in figures["dimensions"].items() for row in _dimension_rows(name, dimension)]
    lines += ["", f"{'machine':<16}{'clock':>18}{'disk write':>14}{'disk free':>12}"]
    lines += [_machine_row(machine) for machine in figures["machines"]]
    lines += ["", *(f"warning: {warning['text']}" for warning in figures["warnings"])]
    return "\n".join(lines).rstrip()


def _rank_row(name: str, ranks: list[dict[str, Any]], key: str, hosts: list[str], shown: Callable[[float], str]) -> str:
    rates = [rank[key] for rank in ranks]
    lowest = min(range(len(rates)), key=rates.__getitem__)
    return (
        f"{name:<14}{shown(statistics.median(rates)):>16}{shown(rates[lowest]):>16}  {describe_ranks([lowest], hosts)}"
    )


def _dimension_rows(name: str, dimension: dict[str, Any]) -> list[str]:
    degree, count = dimension["degree"], len(dimension["groups"])
    rows = []
    for op in (*OPS, "send_recv"):
        figure = dimension[op]
        last = figure["sizes"][-1]
        slowest = bus_factor(op, degree) * last["bytes"] / last["slowest_seconds"]
        title = (name, f"{count} x {degree}") if op == OPS[0] else ("", "")
        rows.append(
            f"{title[0]:<14}{title[1]:>8}{'':3}{op.replace('_', '-'):<12}{figure['latency_s'] * 1e6:>7.0f} us"
            f"{_rate(last['bus_bytes_per_s']):>16}{_rate(slowest):>14}  at {human_bytes(last['bytes'])}"
        )
    return rows


def _machine_row(machine: dict[str, Any]) -> str:
    clock = f"{1e3 * machine['clock_skew_s']:+.2f} ± {1e3 * machine['clock_uncertainty_s']:.2f} ms"
    written, free = machine["disk_write_bytes_per_s"], machine["disk_free_bytes"]
    shown = ("fails", "") if written is None else (_rate(written), human_bytes(free))
    return f"{machine['host']:<16}{clock:>18}{shown[0]:>14}{shown[1]:>12}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _flops(per_s: float) -> str:
    return f"{per_s / 1e12:.3g} TFLOP/s"
