"""One run, killed again and again: every attempt on a layout of its own, ended by kill -9 at a moment that is drawn.

An attempt is the same training command on forked ranks. At the drawn moment a rank kills itself, or tells this
process, which soon after kills one rank or all of them; as torchrun would, it then kills the others, a little later,
so that they may go on writing for a while. After every kill the folder is looked through.
"""

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from moments import MOMENTS, Moment, draw_moment, wrap

from dtron.checkpoint.files import MANIFEST, find_damage, read_manifest, steps_in
from dtron.checkpoint.save import Saver, _LocalWriter
from dtron.checkpoint.storage import StoragePath
from dtron.config import load
from dtron.observe.metrics import read_metrics
from dtron.ranks.world import World
from dtron.train.resolve import resolve
from dtron.train.trainer import Trainer

__all__ = ["LAYOUTS", "Killed", "Plan", "Run", "draw_plans", "table"]

FRONTDOOR = str(Path(__file__).resolve().parents[1] / "frontdoor")
KEEP = 2
PATIENCE = 30  # steps of an attempt after which a moment that does not come is not waited for
HANGS_S = 120.0
CONFIG = f"""
[job]
custom_import = ["frontdoor_parts"]
[metrics]
log_freq = 1
enable_tensorboard = false
[model]
n_layers = 4
dim = 16
n_heads = 2
n_kv_heads = 2
ffn_dim = 32
vocab_size = 64
[optimizer]
lr = 1e-3
eps = 1e-4  # see tests/parity/single.py
[lr_scheduler]
warmup_steps = 5
[training]
device = "cpu"
dataset = "uneven"
seq_len = 16
global_batch_size = 8
mixed_precision_param = "float32"
[activation_checkpoint]
mode = "none"
[checkpoint]
enable = true
keep_latest_k = {KEEP}
"""
ZERO_BUBBLE = "--parallelism.pipeline_parallel_schedule ZBVZeroBubble"
LAYOUTS = {  # ranks, arguments
    "one": (1, "--training.local_batch_size 8"),
    "dp2": (2, "--dp 2 --training.local_batch_size 4"),
    "tp2": (2, "--tp 2 --training.local_batch_size 8"),
    "cp2": (2, "--cp 2 --training.local_batch_size 8"),
    "pp2 1F1B": (2, "--pp 2 --training.local_batch_size 4"),
    "pp2 ZBV": (2, f"--pp 2 --training.local_batch_size 4 {ZERO_BUBBLE}"),
    "hsdp2x2": (4, "--dp-replicate 2 --dp 2 --training.local_batch_size 2"),
    "dp2 x tp2": (4, "--dp 2 --tp 2 --training.local_batch_size 4"),
}


@dataclass(frozen=True)
class Plan:
    """An attempt and its kill. `slow_s`: what the data and the manifest take longer to write, as on a slower disk.

    trigger: the rank whose `passed`-th coming to the moment it is. victims: the ranks killed `delay_s` later; delay_s
    None: the trigger kills itself then and there. The other ranks are killed `spread_s` after them. phase "": no kill.
    """

    layout: str = "one"
    interval: int = 10**6
    mode: str = "disabled"
    slow_s: float = 0.0
    phase: str = ""
    moment: Moment | None = None
    passed: int = 0
    trigger: int = 0
    victims: tuple[int, ...] = ()
    delay_s: float | None = None
    spread_s: float = 0.0


def draw_plans(seed: int, kills: int) -> list[Plan]:
    """Plans for so many kills, every phase equally often."""
    rng = random.Random(seed)
    phases = [phase for _ in range(-(-kills // len(MOMENTS))) for phase in rng.sample(list(MOMENTS), len(MOMENTS))]
    return [_draw(rng, phase) for phase in phases[:kills]]


def _draw(rng: random.Random, phase: str) -> Plan:
    layout = rng.choice(list(LAYOUTS))
    world = LAYOUTS[layout][0]
    moment = draw_moment(rng, phase)
    background = phase in ("copy", "wait") or rng.random() < 0.5
    at_once = moment is not None and rng.random() < 0.5
    trigger = 0 if moment is not None and moment.rank_0 else rng.randrange(world)
    some = (rng.randrange(world),) if rng.random() < 0.7 else tuple(range(world))
    return Plan(
        layout,
        interval=rng.randint(2, 5),
        mode="async" if background else "disabled",
        slow_s=0.3 if phase == "wait" else rng.choice((0.0, 0.05, 0.2) if background else (0.0, 0.05)),
        phase=phase,
        moment=moment,
        passed=_draw_passed(rng, phase, moment.often if moment else 1),
        trigger=trigger,
        victims=(trigger,) if at_once else some,
        delay_s=None if at_once else rng.uniform(0, 0.05 if moment else 0.4),
        spread_s=rng.choice((0.0, rng.uniform(0, 0.3))),
    )


def _draw_passed(rng: random.Random, phase: str, often: int) -> int:
    """A start comes once; of a save's single moments now and then the second save's is taken."""
    return 0 if phase == "start" else rng.randrange(often) if often > 1 else rng.choice((0, 0, 1))


@dataclass
class Killed:
    """What became of an attempt. Times are of time.monotonic()."""

    number: int
    plan: Plan
    began_s: float
    resumed: dict[int, int] = field(default_factory=dict)  # rank -> step it went on from
    reached: int = 0  # the last step that any rank finished
    first_step_s: float | None = None  # when rank 0 had finished its first step
    saved: int = 0  # the last step whose save rank 0 has seen to the end
    saving: set[tuple[int, int]] = field(default_factory=set)  # (rank, step) of saves that began and did not end
    as_planned: bool = False  # the moment came
    killed_s: float | None = None  # None: it reached the end of the run
    newest: int = 0  # afterwards: newest finished checkpoint
    finished: list[int] = field(default_factory=list)  # all of them
    debris: list[str] = field(default_factory=list)  # half written and half deleted ones

    @property
    def inside_a_save(self) -> bool:
        """A killed rank had begun to save and not ended."""
        return any(rank in self.plan.victims for rank, _ in self.saving)

    def line(self, restart_s: float | None) -> str:
        plan = self.plan
        moment = plan.moment.name if plan.moment else "at a random time"
        at = "at once" if plan.delay_s is None else f"{1000 * plan.delay_s:.0f} ms later"
        who = ",".join(map(str, plan.victims))
        save = f"save {max(step for _, step in self.saving)}" if self.inside_a_save else "-"
        how = f"{plan.mode} every {plan.interval}"
        return (
            f"{self.number:3} {plan.layout:9} {how:16} {plan.phase:8} {moment:28} {'' if self.as_planned else 'missed'}"
            f" rank {plan.trigger}, kills {who} {at}; others {1000 * plan.spread_s:.0f} ms: {save:8}"
            f" steps {max(self.resumed.values(), default=0)}..{self.reached}, left {self.finished} {self.debris}"
            + (f", next step after {restart_s:.1f} s" if restart_s else "")
        )


class Run:
    """The training of `steps` steps in `folder`, attempt after attempt."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.attempts = folder, steps, list[Killed]()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.toml").write_text(CONFIG)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def rows(self) -> list[dict[str, Any]]:
        (path,) = self.outputs.glob("*/metrics.jsonl")
        return read_metrics(path)

    def attempt(self, plan: Plan) -> Killed:
        """Start the command, kill it as planned, and look at what it left. AssertionError where it is not whole."""
        outcome = _Attempt(self, plan, len(self.attempts) + 1).outcome()
        self.attempts.append(outcome)
        self._look(outcome)
        if len(self.attempts) > 1:
            self._compare(self.attempts[-2], outcome)
        return outcome

    def _look(self, outcome: Killed) -> None:
        """After every kill: one run folder, and every checkpoint in it that has a final name is whole."""
        folders = [path.name for path in self.outputs.iterdir()] if self.outputs.exists() else []
        assert len(folders) <= 1, f"attempt {outcome.number}: a second run folder: {folders}"
        place = StoragePath.at(self.outputs / folders[0] / "checkpoint") if folders else StoragePath.at(self.outputs)
        outcome.finished = steps_in(place)
        outcome.newest = max(outcome.finished, default=0)
        for step in outcome.finished:
            checkpoint = place / f"step-{step}"
            manifest = read_manifest(checkpoint)
            damage = find_damage(checkpoint, manifest.files.items())
            assert not damage, f"attempt {outcome.number}: {checkpoint}: {damage}"
            assert manifest.progress.step == step and not manifest.progress.model_only
            assert sorted([*manifest.files, MANIFEST]) == checkpoint.names()
        names = set(place.names()) - {f"step-{step}" for step in outcome.finished}
        outcome.debris = sorted(name for name in names if name.startswith("step-"))
        assert all(".partial-" in name or name.endswith(".deleting") for name in outcome.debris), outcome.debris
        assert outcome.newest >= outcome.saved, f"attempt {outcome.number}: step {outcome.saved} was saved"

    def _compare(self, before: Killed, after: Killed) -> None:
        """The newest finished checkpoint is gone on from, on all ranks; no more than the interval is done again."""
        who = f"attempt {after.number}"
        assert set(after.resumed.values()) <= {before.newest}, f"{who} goes on from {after.resumed}: {before}"
        assert after.newest >= before.newest, f"{who}: step {before.newest} is gone, {after.newest} is the newest"
        lost = before.reached - before.newest
        bound = before.plan.interval * (1 if before.plan.mode == "disabled" else 2)
        assert lost <= bound, f"{who} does {lost} steps again, of at most {bound}"

    def restarts(self) -> Iterator[tuple[Killed, float | None]]:
        """Each attempt that was killed, and the seconds from there to the next attempt's first step, if it had one."""
        for killed, next_one in zip(self.attempts, self.attempts[1:], strict=False):
            came = killed.killed_s is not None and next_one.first_step_s is not None
            yield killed, next_one.first_step_s - killed.killed_s if came else None  # type: ignore[operator]


def table(run: Run) -> str:
    """A line an attempt that was killed."""
    return "\n".join(killed.line(restart_s) for killed, restart_s in run.restarts())


# --- one attempt, from outside


class _Attempt:
    def __init__(self, run: Run, plan: Plan, number: int) -> None:
        self._run, self._plan = run, plan
        self._seen = Killed(number, plan, time.monotonic())
        self._world = LAYOUTS[plan.layout][0]
        self._events, theirs = os.pipe()
        self._text = b""
        self._due: dict[int, float] = {}  # rank -> when it is to be killed
        self._dead: set[int] = set()
        self._killing = False  # from the first kill on, ranks that lost another may fail
        self._failed: dict[int, str] = {}
        self._ended: set[int] = set()
        context = mp.get_context("fork")
        self._ranks = [
            context.Process(target=_be_rank, args=(rank, run, plan, number, theirs), daemon=True)
            for rank in range(self._world)
        ]
        for process in self._ranks:
            process.start()
        os.close(theirs)

    def outcome(self) -> Killed:
        """Watch and kill until all ranks are gone."""
        end = time.monotonic() + HANGS_S
        try:
            while len(self._dead) < self._world:
                assert time.monotonic() < end, self._story("hangs")
                self._step()
            while self._read():
                pass
        finally:
            for process in self._ranks:
                process.kill()
                process.join()
            os.close(self._events)
        if self._seen.killed_s is None:
            assert len(self._ended) == self._world, self._story("ended before its end")
        return self._seen

    def _step(self) -> None:
        """Wait for an event, a death or the time to kill."""
        ends = {self._ranks[rank].sentinel: rank for rank in set(range(self._world)) - self._dead}
        soonest = min(self._due.values(), default=time.monotonic() + 1.0)
        ready = wait([*ends, self._events], timeout=max(0.0, soonest - time.monotonic()))
        if self._events in ready:
            self._read()
        for sentinel in ready:
            if sentinel in ends:
                self._died(ends[sentinel])  # type: ignore[index]
        for rank, due_s in list(self._due.items()):
            if time.monotonic() >= due_s:
                self._kill(rank)

    def _kill(self, rank: int) -> None:
        self._due.pop(rank)
        if rank not in self._dead and rank not in self._ended:
            self._killing = True
            self._ranks[rank].kill()

    def _died(self, rank: int) -> None:
        self._ranks[rank].join()
        self._dead.add(rank)
        if self._ranks[rank].exitcode != -signal.SIGKILL:
            assert rank in self._ended, self._story(f"rank {rank} ended with {self._ranks[rank].exitcode}")
        elif self._seen.killed_s is None:
            self._seen.killed_s = time.monotonic()
            others_s = time.monotonic() + self._plan.spread_s
            for other in set(range(self._world)) - {rank}:
                self._due.setdefault(other, others_s)

    def _read(self) -> bool:
        """Take in what the ranks tell, up to the present; False: nothing more will come."""
        data = os.read(self._events, 1 << 16)
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            self._note(event.pop("what"), **event)
        return bool(data)

    def _note(self, what: str, rank: int, at_s: float, step: int = 0, text: str = "") -> None:
        seen = self._seen
        if what == "begun":
            seen.resumed[rank] = step
        elif what == "step":
            seen.reached = max(seen.reached, step)
            if rank == 0 and seen.first_step_s is None:
                seen.first_step_s = at_s
                if self._plan.phase == "anywhere":
                    self._plan_kill(at_s)
            if self._plan.phase and step - seen.resumed[rank] > PATIENCE and not self._due:
                self._plan_kill(at_s)
        elif what == "saving":
            seen.saving.add((rank, step))
        elif what == "saved":
            seen.saving.remove((rank, step))
            seen.saved = step if rank == 0 else seen.saved
        elif what == "moment":
            seen.as_planned = True
            if self._plan.delay_s is not None:
                self._plan_kill(at_s)
        elif what == "ended":
            self._ended.add(rank)
        elif what == "failed":
            self._failed[rank] = text
            assert seen.killed_s is not None or seen.as_planned or self._killing, self._story("failed by itself")

    def _plan_kill(self, from_s: float) -> None:
        self._seen.as_planned |= self._plan.phase == "anywhere"
        for victim in self._plan.victims:
            self._due.setdefault(victim, from_s + (self._plan.delay_s or 0.0))

    def _story(self, what: str) -> str:
        """What was seen, what the ranks said, and the ends of their logs: why a rank aborted stands only there."""
        logs = [_log(self._run, self._seen.number, rank) for rank in range(self._world)]
        ends = [f"{log.name}: ...{log.read_text()[-2000:]}" for log in logs if log.exists()]
        return "\n".join([f"attempt {self._seen.number} {what}: {self._seen}", *self._failed.values(), *ends])


def _log(run: Run, number: int, rank: int) -> Path:
    return run.folder / f"attempt-{number}-rank-{rank}.log"


# --- one attempt, from inside a rank


def _be_rank(rank: int, run: Run, plan: Plan, number: int, pipe: int) -> NoReturn:
    """What a forked rank does: train as train.py would; a rank that lost the others waits to be killed."""
    world = LAYOUTS[plan.layout][0]
    log = _log(run, number, rank).open("w", buffering=1)
    faulthandler.enable(log)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sys.path.append(FRONTDOOR)

    def tell(what: str, **more: Any) -> None:
        event = {"what": what, "rank": rank, "at_s": time.monotonic(), **more}
        os.write(pipe, json.dumps(event).encode() + b"\n")  # one write, shorter than PIPE_BUF: never torn

    _report(tell, plan)
    if plan.moment and rank == plan.trigger:
        _arm(tell, plan)
    try:
        dist.init_process_group("gloo", init_method=f"file://{run.folder}/store-{number}", rank=rank, world_size=world)
        arguments = f"--job.config_file {run.folder}/run.toml --job.dump_folder {run.outputs} "
        arguments += f"--training.steps {run.steps} --checkpoint.interval {plan.interval} "
        arguments += f"--checkpoint.async_mode {plan.mode} {LAYOUTS[plan.layout][1]}"
        setup = resolve(load(arguments.split()), world)
        trainer = Trainer(setup, World(rank, rank, world, dist.HashStore()))
        tell("begun", step=trainer.progress.step)
        trainer.run()
        dist.destroy_process_group()
        tell("ended")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        tell("failed", text=traceback.format_exc()[-2000:])
        time.sleep(2 * HANGS_S)
        os._exit(1)


def _report(tell: Any, plan: Plan) -> None:
    """Tell the steps and the saves; and take longer to write."""

    def save(original: Any, saver: Saver, model: Any, optimizers: Any, progress: Any) -> Any:
        tell("saving", step=progress.step)
        return original(saver, model, optimizers, progress)

    def write(original: Any, saver: Saver, tensors: Any, manifest: Any) -> Any:
        result = original(saver, tensors, manifest)
        tell("saved", step=manifest.progress.step)
        return result

    def train_step(original: Any, trainer: Trainer, clock: Any) -> Any:
        result = original(trainer, clock)
        tell("step", step=trainer.progress.step)
        return result

    def slowly(original: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(plan.slow_s)
        return original(*args, **kwargs)

    wrap(Saver, "save", save)
    wrap(Saver, "_write", write)
    wrap(Trainer, "train_step", train_step)
    wrap(_LocalWriter, "write_data", slowly)
    wrap(_LocalWriter, "finish", slowly)


def _arm(tell: Any, plan: Plan) -> None:
    assert plan.moment is not None
    left = plan.passed

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            tell("moment")
            if plan.delay_s is None:
                os.kill(os.getpid(), signal.SIGKILL)

    plan.moment.arm(reached)
