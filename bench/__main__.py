"""Run the measurements: ``python -m bench [MEASURE ...] [options]``, from the project's folder."""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from distance import FarHub
from hub import Hub
from processes import SEARCH_PATH
from processes import StartFailed

from bench.growth import growth
from bench.limits import limited
from bench.load import LoadFailed
from bench.measures import MEASURES
from bench.measures import SHORT
from bench.measures import Measure
from bench.measures import Scale
from bench.measures import Stage
from bench.peers import STARTS
from bench.peers import Cached
from bench.peers import Checkout
from bench.peers import Server
from bench.peers import Start
from bench.report import OURS
from bench.report import Results
from bench.report import document
from bench.report import growth_table
from bench.report import table

PROGRAMS = ("docker-registry", "nginx", "setpriv", "skopeo", "ss")
TOKEN_SECONDS = 86400  # longer than any run
MAX_ROUNDS = 100
# What the CDN may hold for each connection: with thousands of them, a host of its own would have that memory.
BOUNDED = "sndbuf=128k"
GROWTH = "growth"
ORDER = [measure.name for measure in MEASURES]
FAILURES = (LoadFailed, StartFailed, OSError, subprocess.SubprocessError)
Item = TypeVar("Item")


def main() -> int:
    """Run what the arguments say; return the exit status."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else servers and files would stay
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        sys.exit(f"bench: install first: {', '.join(missing)}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    scale = SHORT if arguments.short else Scale()
    results = Results.read(arguments.start) if arguments.start else Results(scale._asdict())
    status = 0
    if arguments.rounds:
        status = run(arguments, scale, results)
    if results.samples:
        print(table(results, ORDER))
    if results.curves:
        print(growth_table(results.curves))
    if arguments.docs and not status:
        document(results, ORDER, arguments.docs)
    return status


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the mirror beside its peers.")
    measures = ", ".join([*ORDER, GROWTH])
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"these only, of {measures}; default: all")
    parser.add_argument("--rounds", type=round_count, default=3, metavar="N", help=f"0 to {MAX_ROUNDS}; default 3")
    parser.add_argument("--short", action="store_true", help="one round of small sizes: does all of it still run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there, after each round")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write into performance.md there, and plots beside it")
    begin = "begin with the values of this file; what is measured anew takes their place"
    parser.add_argument("--from", type=Path, metavar="FILE", dest="start", help=begin)
    also = "compare this working copy too; repeatable"
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="DIR", help=also)
    arguments = parser.parse_args()
    if unknown := set(arguments.measures) - {*ORDER, GROWTH}:
        parser.error(f"{', '.join(sorted(unknown))}: no such measure; there are {measures}")
    return arguments


def round_count(text: str) -> int:
    """Return how many rounds `text` says; raise ArgumentTypeError for what is no such number."""
    if not text.isdecimal() or not 0 <= int(text) <= MAX_ROUNDS:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {MAX_ROUNDS}")
    return int(text)


def run(arguments: argparse.Namespace, scale: Scale, results: Results) -> int:
    """Measure; return 1 where that failed, with what is there until then in the results."""
    wanted = arguments.measures or [*ORDER, GROWTH]
    measures = [measure for measure in MEASURES if measure.name in wanted]
    for measure in measures:
        results.samples.pop(measure.name, None)
    rounds = 1 if arguments.short else arguments.rounds
    if not arguments.start:
        results.rounds = rounds
    began = time.monotonic()
    try:
        if measures:
            with stage_of(scale) as stage:
                for number in range(1, rounds + 1):
                    say(f"round {number} of {rounds}, after {time.monotonic() - began:.0f} s")
                    one_round(stage, measures, arguments.also, results)
                    save(results, arguments.json)
        if GROWTH in wanted:
            say(f"growth, after {time.monotonic() - began:.0f} s")
            with stage_of(scale, BOUNDED) as stage:
                results.curves = growth(stage, say)
                save(results, arguments.json)
                results.curves |= limited(stage, say)
            save(results, arguments.json)
    except FAILURES as error:
        say(f"bench: {error}")
        return 1
    say(f"done after {time.monotonic() - began:.0f} s")
    return 0


@contextmanager
def stage_of(scale: Scale, cdn_listen: str = "") -> Iterator[Stage]:
    """Run the hub, near and far."""
    with Hub(cdn_listen) as hub, FarHub(hub, scale.round_trip) as far:
        hub.tokens.expires_in = TOKEN_SECONDS
        yield Stage(hub, far, scale)


def save(results: Results, file: Path | None) -> None:
    """Write all values to a file, if one is named."""
    if file:
        file.write_text(json.dumps(results.as_json(ORDER), indent=1) + "\n")


def one_round(stage: Stage, measures: list[Measure], copies: list[Path], results: Results) -> None:
    """Take every measure of every peer, in an order that chance makes; each pass goes through all its peers.

    Most servers run side by side, so that little time passes between their turns.
    """
    starts = all_starts(copies)
    beside = [measure for measure in measures if not measure.alone]
    wanted = {kind for measure in beside for kind in kinds(measure, copies).values()}
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(starts[kind](stage.hub)) for kind in sorted(wanted)}
        for measure in shuffled([one for one in beside for _ in range(stage.scale.passes if one.repeated else 1)]):
            stage.next_turn()
            taken = {peer: take(measure, peer, servers[kind], stage) for peer, kind in turns(measure, copies)}
            results.add(measure.name, taken)
    for measure in shuffled([measure for measure in measures if measure.alone]):
        taken = {}
        for peer, kind in turns(measure, copies):
            with started(starts[kind], stage, measure.far) as server:
                taken[peer] = take(measure, peer, server, stage)
        results.add(measure.name, taken)


def all_starts(copies: list[Path]) -> dict[str, Start]:
    """Return how to start all kinds of servers, those of other working copies too."""
    starts = dict(STARTS)
    for folder in copies:
        starts[f"mirror of {folder.name}"] = partial(Checkout, folder=folder.resolve())
        starts[f"cached of {folder.name}"] = partial(Cached, folder=folder.resolve())
    return starts


def kinds(measure: Measure, copies: list[Path]) -> dict[str, str]:
    """Return which kind of server stands for each peer."""
    return (
        {OURS: measure.ours}
        | {peer: peer for peer in measure.peers}
        | {folder.name: f"{measure.ours} of {folder.name}" for folder in copies}
    )


def turns(measure: Measure, copies: list[Path]) -> list[tuple[str, str]]:
    """Return peers and kinds in the order of this pass."""
    return shuffled(list(kinds(measure, copies).items()))


def shuffled(items: list[Item]) -> list[Item]:
    """Return the items in an order that chance makes."""
    return random.sample(items, len(items))


@contextmanager
def started(start: Start, stage: Stage, far: bool) -> Iterator[Server]:
    """Run a server, and note how long it took to come up."""
    began = time.monotonic()
    with start(stage.upstream(far)) as server:
        stage.start_seconds = time.monotonic() - began
        yield server


def take(measure: Measure, peer: str, server: Server, stage: Stage) -> dict[str, float]:
    """Take one measure of one peer, and show it."""
    try:
        figures = measure.take(server, stage)
    except FAILURES as error:
        raise LoadFailed(f"{measure.name} of {peer}: {error}") from error
    say(f"  {peer}: " + "; ".join(f"{name}: {value:.3g}" for name, value in figures.items()))
    return figures


def say(line: str) -> None:
    """Show how far the run is; the tables alone go to stdout."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
