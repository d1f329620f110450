"""Measurements of the mirror beside nginx, on the tests' hub: ``python -m bench`` (see README.md here)."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The hub and the servers are the tests'; their modules find each other as pytest has them do, by their folder.
sys.path.append(str(ROOT / "tests"))
