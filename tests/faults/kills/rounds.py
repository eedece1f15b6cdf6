"""A round: what is killed and when, drawn from a seed; doing it; and what came of it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kills.archive import upload
from kills.cluster import LocalCluster, kill
from kills.forge import Driver, Forge
from kills.store import Store
from kills.summary import PHASES
from kills.tables_view import Onlooker, probabilities, problems
from medvision_ray import storage

# By turns, so that any ten rounds in a row hold every kind.
KINDS = (
    "driver",
    "driver in publish",
    "actor",
    "raylet",
    "driver twice",
    "driver in publish",
    "Ray's own actor",
    "driver and actor",
    "driver at the start",
    "actor, then driver in publish",
)
RUN_SECONDS = 300.0
_POLL_SECONDS = 0.02
ACTOR = ("ScoringActor",)
_OWN = ("StatsActor", "ActorLocationTracker", "AutoscalingCoordinator")
# Writes of folder markers change nothing, so they are no moments of their own.
_ANY = r"[^/]\?"
_START = r"/leases/score|/(inventory\.parquet|run\.json)\?"
MARKER = r"/inflight/[^/?]+\?"
ROWS = r"/rows/[^/?]+\?"
_SCORING = rf"{MARKER}|{ROWS}"
_PUBLISH = r"/tables/|\?delete|^DELETE .*/runs/[^/]*/\?"
# What is killed, one after the other, and at a write of which kind.
_STEPS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "driver": ((("driver",), _ANY),),
    "driver twice": ((("driver",), _ANY), (("driver",), _ANY)),
    "driver in publish": ((("driver",), _PUBLISH),),
    "driver at the start": ((("driver",), _START),),
    "driver and actor": ((("actor", "driver"), MARKER),),
    "actor": ((("actor",), MARKER),),
    "Ray's own actor": ((("Ray's own actor",), MARKER),),
    "raylet": ((("raylet",), _SCORING),),
    "actor, then driver in publish": ((("actor",), MARKER), (("driver",), _PUBLISH)),
}


@dataclass(frozen=True)
class Moment:
    """When to kill: at a write request, as a share of all that match, or then some seconds later.

    Attributes:
        pattern: which writes count.
        share: place of the write among them, in [0, 1).
        drop: the write is refused; else it is done, and its sender dies before it hears of it.
        seconds: wait this long after the write is held and let go; 0 kills while it is held.
    """

    pattern: str
    share: float
    drop: bool
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a seed stands for."""

    seed: int
    kind: str
    moments: tuple[Moment, ...]
    named: bool
    actors: int
    choice: int

    @staticmethod
    def of(seed: int) -> Plan:
        """The same seed is the same plan."""
        rng = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        moments = tuple(_moment(rng, pattern, step) for step, (_, pattern) in enumerate(_STEPS[kind]))
        return Plan(seed, kind, moments, rng.random() < 0.5, rng.choice((1, 2)), rng.randrange(1 << 16))


def _moment(rng: random.Random, pattern: str, step: int) -> Moment:
    """Mostly at the write itself; where only the computing is hit otherwise, sometimes a little later.

    A run that goes on where a killed one stopped has fewer writes, so a second moment comes early.
    """
    seconds = rng.uniform(0.0, 0.5) if pattern in (_ANY, MARKER) and rng.random() < 0.3 else 0.0
    share = rng.random() * (0.3 if step and pattern == _ANY else 1.0)
    return Moment(pattern, share, rng.random() < 0.5, seconds)


@dataclass
class Outcome:
    """What came of a round; a line of the results file."""

    seed: int
    kind: str
    hits: list[dict[str, Any]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    resumed: bool = False
    looks: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Theatre:
    """What all rounds share: the store with the archive, the cluster, the forge, an undisturbed run."""

    def __init__(self, bundle: str, store: Store, cluster: LocalCluster, forge: Forge) -> None:
        self._bundle, self._store, self._cluster, self._forge = bundle, store, cluster, forge
        storage.s3_client().create_bucket(Bucket="hospital")
        self._expected = upload("s3://hospital/archive")
        failed = sum(code is not None for code in self._expected.values())
        self._whole = {"predictions": len(self._expected) - failed, "failures": failed, "runs": 1}
        self._store.arm()
        output = "s3://hospital/undisturbed"
        driver = self.start(output, None, actors=2)
        assert self.wait(driver) == 0, driver.log.read_text()
        self._writes = self._store.seen()
        self._reference = probabilities(output)
        wrong = self.problems(output)
        assert not wrong, wrong

    def play(self, plan: Plan) -> Outcome:
        """One round; whatever it finds wrong is in the outcome."""
        started = time.monotonic()
        output = f"s3://hospital/round-{plan.seed}"
        key = f"round-{plan.seed}" if plan.named else None
        outcome = Outcome(plan.seed, plan.kind)
        driver = None
        with Onlooker(output, self._whole) as onlooker:
            for moment, (victims, _) in zip(plan.moments, _STEPS[plan.kind], strict=True):
                self._arm(moment)
                driver = driver if driver and driver.code is None else self.start(output, key, plan.actors)
                outcome.hits.append(self._disturb(plan, moment, victims, driver))
                if "driver" in victims:
                    outcome.codes.append(self.wait(driver))
            if driver is not None and driver.code is None:
                outcome.codes.append(self.wait(driver))
            self._store.arm()
            self._cluster.replace_nodes()
            again = self.start(output, key, plan.actors)
            outcome.codes.append(self.wait(again))
        text = again.log.read_text()
        outcome.resumed = "already; nothing to do" not in text and "0 objects to score" not in text
        outcome.looks = onlooker.looks
        outcome.problems = onlooker.problems[:5] + self.problems(output)
        if outcome.codes[-1] != 0:
            outcome.problems.append(f"the last run ended with {outcome.codes[-1]}: {text[-1500:]}")
        outcome.seconds = round(time.monotonic() - started, 2)
        return outcome

    def wait(self, driver: Driver) -> int:
        """The exit status of a driver, which must end by itself."""
        return self._forge.wait(driver, RUN_SECONDS)

    def problems(self, output: str) -> list[str]:
        """How the tables of an output differ from those of an undisturbed run."""
        return problems(output, self._expected, self._reference)

    def hold_at_first_marker(self, driver: Callable[[], Driver]) -> Driver:
        """Start a run and hold it where an actor begins on the first block, until `release`."""
        return self.hold(driver, MARKER, 1)

    def hold(self, driver: Callable[[], Driver], pattern: str, number: int, *, onwards: bool = False) -> Driver:
        """Start a run and hold it at its n-th write of a kind, `onwards` at those after it too, until `release`."""
        self._store.arm(pattern, number, onwards=onwards)
        started = driver()
        self.await_held(started)
        return started

    def await_held(self, driver: Driver) -> None:
        """Wait for the write that the store was armed for."""
        deadline = time.monotonic() + RUN_SECONDS
        while self._store.held() is None:
            assert driver.code is None, driver.log.read_text()
            assert time.monotonic() < deadline, "the run has not come to the write at which it is to be held"
            self._forge.poll()
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Let the held run go on."""
        self._store.release()
        self._store.arm()

    def start(self, output: str, key: str | None, actors: int = 1) -> Driver:
        """Start scoring the archive; None lets the run name itself."""
        settings = {
            "archive.uri": "s3://hospital/archive",
            "bundle": self._bundle,
            "output": output,
            "privacy.demo_key": "true",
            "scoring.block_rows": "3",
            "scoring.precision": "float32",
            "scoring.actors": str(actors),
            "budget.max_failure_fraction": "1.0",
            "ray.address": self._cluster.address,
        }
        if key:
            settings["run_key"] = key
        options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        return self._forge.start(["score", "--json", *options])

    def _arm(self, moment: Moment) -> None:
        writes = [name for name in self._writes if re.search(moment.pattern, name)]
        self._store.arm(moment.pattern, 1 + int(moment.share * len(writes)), drop=moment.drop and not moment.seconds)

    def _disturb(self, plan: Plan, moment: Moment, victims: Sequence[str], driver: Driver) -> dict[str, Any]:
        """Wait for the moment, kill, and say what was hit."""
        begun = time.monotonic()
        write = None
        while write is None and driver.code is None and time.monotonic() - begun < RUN_SECONDS:
            write = self._store.held()
            self._forge.poll()
            time.sleep(_POLL_SECONDS)
        if moment.seconds:
            self._store.release()
            time.sleep(moment.seconds)
            self._forge.poll()
        hit: dict[str, Any] = {"write": write, "dropped": moment.drop and not moment.seconds, "after": moment.seconds}
        hit["killed"] = [name for name in victims if self._kill(name, plan.choice, driver)]
        text = (write or "").lower()
        hit["phase"] = next((name for name in PHASES if name in text), "other") if write else "over"
        self._store.release()
        return hit

    def _kill(self, victim: str, choice: int, driver: Driver) -> bool:
        if victim == "driver":
            return driver.code is None and kill(driver.pid)
        if victim == "raylet":
            self._cluster.kill_node(choice)
            return True
        found = self._cluster.workers(*(ACTOR if victim == "actor" else _OWN))
        return bool(found) and kill(found[choice % len(found)])
