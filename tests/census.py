"""gunicorn's configuration of a mirror that takes a census: wsgi.py's, and SIGRTMIN makes a worker count what it holds.

It writes that into a file of its own number, in the folder that CENSUS_FOLDER names; held.py reads it. Memory is given
back sooner than elsewhere, so that no test has to wait for that.
"""

import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from greenlet import greenlet

import wsgi
from wsgi import *  # noqa: F403 - these names are gunicorn's settings

wsgi.TRIM_EVERY = 2  # seconds


def post_fork(server: Any, worker: Any) -> None:
    """Wait for the signal, which is none of those that have a meaning to gunicorn."""
    signal.signal(signal.SIGRTMIN, write)


def write(*_: object) -> None:
    """Write how many greenlets there are, by what they run, over or not, and how many blocks of memory Python uses."""
    gc.collect()
    blocks = sys.getallocatedblocks()
    greenlets = Counter(running(each) for each in gc.get_objects() if isinstance(each, greenlet))
    file = Path(os.environ["CENSUS_FOLDER"], str(os.getpid()))
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps([greenlets, blocks]))
    unfinished.rename(file)


def running(one: greenlet) -> str:
    """Return the name of what a greenlet runs."""
    return getattr(getattr(one, "_run", None), "__qualname__", type(one).__qualname__)
