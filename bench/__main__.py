"""Run the measurements: ``python -m bench [compare|clients|cache] [options]``, from the project's folder."""

import argparse
import json
import random
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from hub import Hub
from processes import SEARCH_PATH

from bench.cached import PEERS
from bench.cached import compare_cached
from bench.measures import MB
from bench.measures import MIB
from bench.measures import RATES
from bench.measures import SHORT
from bench.measures import Blobs
from bench.measures import Scale
from bench.measures import make_blobs
from bench.measures import many_clients
from bench.measures import memory
from bench.peers import Start
from bench.peers import peers
from bench.report import NGINX
from bench.report import Samples
from bench.report import add
from bench.report import as_json
from bench.report import table

PROGRAMS = ("docker-registry", "nginx", "setpriv")
TOKEN_SECONDS = 86400  # longer than any run
MAX_ROUNDS = 100
MAX_GROWTH = 64 * MIB


def main() -> int:
    """Run what the arguments say; return the exit status."""
    arguments = parse_arguments()
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        sys.exit(f"bench: install first: {', '.join(missing)}")
    scale = SHORT if arguments.short else Scale()
    starts = peers(arguments.also)
    with Hub() as hub:
        hub.tokens.expires_in = TOKEN_SECONDS
        rounds = 1 if arguments.short else arguments.rounds
        if arguments.what == "cache":
            return report(compare_cached(hub, scale, rounds, say), PEERS, scale, arguments.json)
        blobs = make_blobs(hub, scale)
        if arguments.what == "clients":
            return clients(hub, starts, blobs, scale)
        samples = compare(hub, starts, blobs, scale, rounds)
    return report(samples, list(starts), scale, arguments.json)


def report(samples: Samples, peers: list[str], scale: Scale, file: Path | None) -> int:
    """Print the table, and write all values to a file; return 0."""
    print(table(samples, peers))
    if file:
        file.write_text(json.dumps(as_json(samples, peers, scale._asdict()), indent=2) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the mirror beside nginx.")
    parser.add_argument(
        "what",
        nargs="?",
        default="compare",
        choices=["compare", "clients", "cache"],
        help="compare: rates, CPU and memory beside nginx (the default); "
        "clients: 100 clients at 1 MB/s each, their digests and the mirror's memory; "
        "cache: what the cache costs and gives, beside docker-registry and nginx with a file",
    )
    parser.add_argument("--rounds", type=round_count, default=5, metavar="N", help=f"1 to {MAX_ROUNDS}; default 5")
    parser.add_argument("--short", action="store_true", help="one round of small sizes: does all of it still run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    also = "compare this working copy too; repeatable"
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="DIR", help=also)
    return parser.parse_args()


def round_count(text: str) -> int:
    """Return how many rounds `text` says; raise ArgumentTypeError for what is no such number."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_ROUNDS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_ROUNDS}")
    return int(text)


def compare(hub: Hub, starts: dict[str, Start], blobs: Blobs, scale: Scale, rounds: int) -> Samples:
    """Measure every peer in every round, in an order that chance makes."""
    samples: Samples = {}
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        compare_rates(hub, starts, blobs, scale, samples)
        compare_memory(hub, starts, blobs, scale, samples)
    return dict(sorted(samples.items()))


def compare_rates(hub: Hub, starts: dict[str, Start], blobs: Blobs, scale: Scale, samples: Samples) -> None:
    """Measure the rates of all peers, which run side by side so that little time passes between their turns."""
    with ExitStack() as stack:
        servers = {peer: stack.enter_context(start(hub)) for peer, start in starts.items()}
        for _ in range(scale.passes):
            for measure in random.sample(RATES, len(RATES)):
                for peer in random.sample(list(servers), len(servers)):
                    note(samples, peer, measure(servers[peer], blobs, scale))


def compare_memory(hub: Hub, starts: dict[str, Start], blobs: Blobs, scale: Scale, samples: Samples) -> None:
    """Measure the memory of all peers, one after the other."""
    for peer in random.sample(list(starts), len(starts)):
        with starts[peer](hub) as server:
            note(samples, peer, memory(server, blobs, scale))


def note(samples: Samples, peer: str, figures: dict[str, float]) -> None:
    """Keep what one peer reached in one pass, and show it."""
    add(samples, peer, figures)
    say(f"  {peer}: " + "; ".join(f"{name}: {value:.3g}" for name, value in figures.items()))


def say(line: str) -> None:
    """Show how far the run is; the table alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)


def clients(hub: Hub, starts: dict[str, Start], blobs: Blobs, scale: Scale) -> int:
    """Put many clients to each mirror; return 1 unless all got the right bytes and the memory stayed in its bound."""
    status = 0
    for peer in (name for name in starts if name not in NGINX):
        with starts[peer](hub) as server:
            got = many_clients(server, blobs, scale)
        print(
            f"{peer}: {got.ended.right} of {scale.clients} clients got the right {blobs.part.size / MB:.0f} MB "
            f"at {got.ended.rate / scale.clients / MB:.2f} MB/s each in {got.ended.seconds:.0f} s; "
            f"PSS {got.idle / MIB:.1f} MiB idle, {got.peak / MIB:.1f} MiB at its peak: {got.growth / MIB:+.1f} MiB"
        )
        if got.ended.right < scale.clients or got.growth >= MAX_GROWTH:
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
