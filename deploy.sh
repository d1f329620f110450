#!/usr/bin/env bash
# Set docker-mirror up on this host and run it. See usage() below.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
bind=127.0.0.1:5000

# The packages that bring the tests' real servers and clients.
test_packages=(docker-registry nginx skopeo podman uidmap docker.io containerd tinyproxy-bin microsocks
    redis-server shellcheck curl haproxy apache2-bin caddy)

usage() {
    cat <<END
Usage: ./deploy.sh COMMAND

  run [GUNICORN OPTIONS]  make .venv, install, and serve on $bind in the foreground
                          (--bind ADDRESS, --workers N … are gunicorn's own options)
  test [PYTEST OPTIONS]   make .venv, install all that the tests need, and run them
  --help                  show this text

Settings are environment variables; README.md lists them.
END
}

say() { printf '%s\n' "$*" >&2; }

die() {
    say "deploy.sh: $*"
    exit 1
}

# Install Debian packages as root; otherwise name the one command that does, and stop.
apt_install() {
    local reason=$1
    shift
    local command="apt-get install --yes --no-install-recommends $*"
    if [ "$(id -u)" -ne 0 ]; then
        die "$reason; run this once: sudo $command"
    elif ! command -v apt-get >/dev/null; then
        die "$reason, and this host has no apt-get: install it by hand"
    fi
    say "$reason; installing: $*"
    # What went wrong is told by the installation itself: an old list may do.
    apt-get update --quiet >/dev/null 2>&1 || true
    # shellcheck disable=SC2086 # the command's words are this script's own
    DEBIAN_FRONTEND=noninteractive $command >/dev/null || die "apt-get could not install: $*"
}

has_venv() { python3 -c 'import ensurepip, venv' 2>/dev/null; }

make_venv() {
    command -v python3 >/dev/null || apt_install "python3 is missing" python3 python3-venv
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "Python 3.11 or newer is needed, this is $(python3 --version)"
    if [ ! -x "$venv/bin/pip" ]; then
        has_venv || apt_install "Python's venv module is missing" python3-venv
        has_venv || die "python3 is $(command -v python3), and it still has no venv module"
        python3 -m venv "$venv" || die "cannot make $venv"
    fi
}

# Install this folder with its dependencies, unless that was done since setup.cfg changed.
install_into_venv() {
    local extras=$1
    local stamp=$venv/.installed${extras}
    if [ "$stamp" -nt "$here/setup.cfg" ] && [ "$stamp" -nt "$here/pyproject.toml" ]; then
        return
    fi
    say "installing into $venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --editable "$here$extras" ||
        die "pip could not install; its message stands above"
    touch "$stamp"
}

run() {
    make_venv
    install_into_venv ""
    # gunicorn listens on every --bind that it is given, so ours must not stand beside another.
    case " $* ${GUNICORN_CMD_ARGS:-} " in
        *" -b"* | *" --bi"*) ;;
        *) set -- --bind "$bind" "$@" ;;
    esac
    exec "$venv/bin/gunicorn" --config python:wsgi --worker-connections 2000 --keep-alive 75 --graceful-timeout 300 "$@" wsgi:app
}

# As root, bring the real servers and clients; elsewhere the tests that need a missing one skip and say so.
install_test_packages() {
    local missing=()
    local package
    command -v dpkg-query >/dev/null || return 0
    for package in "${test_packages[@]}"; do
        dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$package")
    done
    if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" -eq 0 ]; then
        apt_install "the tests' servers and clients are missing" "${missing[@]}"
    elif [ "${#missing[@]}" -gt 0 ]; then
        say "tests that need these packages will skip: ${missing[*]}"
    fi
}

run_tests() {
    install_test_packages
    make_venv
    install_into_venv "[test]"
    cd "$here"
    local bin=$venv/bin
    "$bin/ruff" format --check .
    "$bin/ruff" check .
    "$bin/mypy"
    if command -v shellcheck >/dev/null; then
        shellcheck deploy.sh .ci/run
    fi
    "$bin/coverage" erase
    "$bin/coverage" run -m pytest "$@"
    "$bin/coverage" combine --quiet
    # All of mirror.py is reached only with the real servers and clients, and by all tests.
    if [ "$#" -eq 0 ] && [ "${CI:-}" = true ]; then
        "$bin/coverage" report --include=mirror.py --fail-under=95
    else
        "$bin/coverage" report
    fi
}

main() {
    case ${1:---help} in
        run)
            shift
            run "$@"
            ;;
        test)
            shift
            run_tests "$@"
            ;;
        --help | -h | help)
            usage
            ;;
        *)
            say "deploy.sh: unknown command or option: $1"
            usage >&2
            exit 2
            ;;
    esac
}

main "$@"
