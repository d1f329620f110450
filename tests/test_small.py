"""What the mirror does without: modules that only some settings need. test_soak.py holds what a burst leaves."""

import subprocess
import sys
from pathlib import Path

from processes import clean_environment

ROOT = Path(__file__).resolve().parent.parent
NEEDED_BY_SOME = {
    *("asyncio", "bcrypt", "charset_normalizer", "cryptography", "limits", "multiprocessing", "redis", "sqlite3"),
    *("metrics", "prometheus_client", "unittest", "xml"),
}


def imported(**settings: str) -> set[str]:
    """Return the modules that the master has imported before it forks its workers."""
    inherited = {name: value for name, value in clean_environment().items() if not name.startswith("MIRROR_")}
    code = "import wsgi, sys; print(*(name for name, module in sys.modules.items() if module is not None))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in inherited.items() if not name.startswith("COVERAGE_")} | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not ended.stderr, "no warning is shown"
    return set(ended.stdout.split())


def test_the_default_settings_import_nothing_that_only_others_need() -> None:
    assert not imported() & NEEDED_BY_SOME


def test_what_a_setting_needs_is_imported_before_the_workers_are_forked() -> None:
    assert "limits" in imported(MIRROR_PULL_RATE="10/m")
