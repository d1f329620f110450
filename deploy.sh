#!/usr/bin/env bash
# Set docker-mirror up on this host: run it, test it, or let it be a service. See usage() below.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
bind=127.0.0.1:5000

# Where the service lives; the units name the same places.
releases=/opt/docker-mirror
settings=/etc/docker-mirror
cache=/var/cache/docker-mirror
unit_files=/etc/systemd/system
service=docker-mirror.service
socket=docker-mirror.socket

# Options of check, install and uninstall.
dry_run=
wheels=
purge=

# The packages that bring the tests' real servers and clients.
test_packages=(docker-registry nginx skopeo podman uidmap docker.io containerd tinyproxy-bin microsocks
    redis-server shellcheck curl haproxy apache2-bin caddy chromium chromium-driver)

usage() {
    cat <<END
Usage: ./deploy.sh COMMAND

  run [GUNICORN OPTIONS]  make .venv, install, and serve on $bind in the foreground
                          (--bind ADDRESS, --workers N … are gunicorn's own options)
  test [PYTEST OPTIONS]   make .venv, install all that the tests need, and run them
  check                   look for all that this host needs, and name the fix of each problem
  check URL [IMAGE]       walk a pull through a mirror, as docker-mirror check does
  install                 install or upgrade the service, start it, and see that it answers;
                          where it does not, go back to the version before
  uninstall               take the service away; settings and cache stay
  --help                  show this text

  --dry-run               check, install, uninstall: only print what would be done
  --wheels DIR            install: take all packages from this folder, without a network
  --purge                 uninstall: take settings and cache away too

Settings are environment variables, for the service in $settings/docker-mirror.env; README.md lists them.
END
}

say() { printf '%s\n' "$*" >&2; }

die() {
    say "deploy.sh: $*"
    exit 1
}

# Do what changes this host; with --dry-run, only say it.
act() {
    changed=yes
    if [ -n "$dry_run" ]; then
        say "would run: $*"
    else
        "$@"
    fi
}

# Install Debian packages as root; otherwise name the one command that does, and stop.
apt_install() {
    local reason=$1
    shift
    local command="apt-get install --yes --no-install-recommends $*"
    if [ -n "$dry_run" ]; then
        act "$command"
        say "what comes after that cannot be told before"
        exit 0
    elif [ "$(id -u)" -ne 0 ]; then
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

need_python() {
    command -v python3 >/dev/null || apt_install "python3 is missing" python3 python3-venv
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "Python 3.11 or newer is needed, this is $(python3 --version)"
}

need_venv() {
    has_venv || apt_install "Python's venv module is missing" python3-venv
    has_venv || die "python3 is $(command -v python3), and it still has no venv module"
}

make_venv() {
    need_python
    if [ ! -x "$venv/bin/pip" ]; then
        need_venv
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
        shellcheck deploy.sh .ci/run tests/host/run.sh
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

# Read the options of check, install and uninstall; what is none goes into `arguments`.
read_options() {
    arguments=()
    while [ "$#" -gt 0 ]; do
        case $1 in
            --dry-run) dry_run=yes ;;
            --purge) purge=yes ;;
            --wheels)
                [ "$#" -gt 1 ] || die "--wheels needs a folder"
                wheels=$2
                shift
                ;;
            --wheels=*) wheels=${1#*=} ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
    if [ -n "$wheels" ]; then
        wheels=$(cd -- "$wheels" && pwd) || die "--wheels needs a folder"
    fi
}

refuse_arguments() { [ "${#arguments[@]}" -eq 0 ] || die "unknown option: ${arguments[0]}"; }

need_root() {
    [ -n "$dry_run" ] || [ "$(id -u)" -eq 0 ] || die "root is needed: sudo ./deploy.sh $1"
}

# Print where the mirror listens: the last word of the socket unit and of the owner's changes to it.
address() {
    { cat "$here/systemd/$socket" "$unit_files/$socket.d"/*.conf 2>/dev/null || true; } |
        sed -n 's/^ListenStream=\(.\)/\1/p' | tail -n 1
}

is_active() { systemctl is-active --quiet "$1" 2>/dev/null; }

check() {
    read_options "$@"
    need_python
    if [ "${#arguments[@]}" -gt 0 ]; then
        check_mirror
    elif is_active "$socket"; then
        python3 -B "$here/preflight.py"
    else
        python3 -B "$here/preflight.py" --address "$(address)"
    fi
}

# Walk a pull, with the command that is installed or with the one of this folder.
check_mirror() {
    local command=$releases/current/bin/docker-mirror
    if [ ! -x "$command" ]; then
        make_venv
        install_into_venv ""
        command=$venv/bin/docker-mirror
    fi
    exec "$command" check "${arguments[@]}"
}

# Print the files that make a version.
sources() {
    cd "$here"
    find . -maxdepth 1 -type f \( -name '*.py' -o -name 'setup.cfg' -o -name 'pyproject.toml' -o -name 'LICENSE' \
        -o -name 'README.md' \) | sort
    for folder in systemd templates; do
        [ ! -d "$folder" ] || find "$folder" -type f | sort
    done
}

# Print the name of this version: its number, and a hash of its files and of the Python that it is for.
release_name() {
    local number hash
    number=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$here/mirror.py")
    hash=$(cd "$here" && { sources | xargs -d '\n' sha256sum && python3 --version; } | sha256sum | cut -c 1-12)
    printf '%s-%s\n' "$number" "$hash"
}

install_service() {
    read_options "$@"
    refuse_arguments
    need_root install
    umask 022
    need_python
    need_venv
    check_host
    local name before
    name=$(release_name)
    before=$(current)
    changed=
    build "$name"
    copy_settings
    if ! { activate "$name" && answers; }; then
        go_back "$before" "$name"
    elif [ -z "$changed" ]; then
        say "docker-mirror $name is installed and serves: nothing to change"
    elif [ -z "$dry_run" ]; then
        remove_old_releases "$before" "$name"
        say "docker-mirror $name serves at $(address); its settings stand in $settings/docker-mirror.env"
    fi
}

check_host() {
    local options=(--host-only)
    is_active "$socket" || options+=(--address "$(address)")
    python3 -B "$here/preflight.py" "${options[@]}" >&2 || [ -n "$dry_run" ] || die "not installed"
}

# Print the name of the version that is installed, if one is.
current() { readlink "$releases/current" || true; }

# Install a version into a folder of its own, unless it is there. pip leaves folders in a copy of the sources.
build() {
    local files release=$releases/$1 options=()
    [ ! -e "$release/complete" ] || return 0
    say "installing into $release"
    [ -z "$wheels" ] || options=(--no-index --find-links "$wheels")
    mapfile -t files < <(sources)
    act rm -rf "$release"
    act mkdir -p "$release/source"
    act python3 -m venv "$release" || die "cannot make $release"
    act env -C "$here" cp --parents --target-directory "$release/source" "${files[@]}"
    act "$release/bin/pip" install --quiet --disable-pip-version-check "${options[@]}" "$release/source" ||
        die "pip could not install; its message stands above"
    act touch "$release/complete"
}

# Give the owner files to write settings into, and never touch them again.
copy_settings() {
    [ -d "$settings" ] || act install -d -m 755 "$settings"
    [ -d "$settings/credentials" ] || act install -d -m 700 "$settings/credentials"
    copy_once docker-mirror.env 600
    copy_once registries.toml.example 644
}

copy_once() {
    [ -e "$settings/$1" ] || act install -m "$2" "$here/systemd/$1" "$settings/$1"
}

# Let a version be the one that serves.
activate() {
    local units
    if [ "$(current)" != "$1" ]; then
        act ln -sfn "$1" "$releases/.current" && act mv -T "$releases/.current" "$releases/current" || return
    fi
    units=$(changed_units "$1")
    if [ -n "$units" ]; then
        install_units "$1" || return
    fi
    if ! systemctl is-enabled --quiet "$socket" "$service" 2>/dev/null; then
        act systemctl enable --quiet "$socket" "$service" || return
    fi
    start "$1" "$units"
}

# Print the units of a version that are not installed as they are.
changed_units() {
    local unit from=$releases/$1/source/systemd
    [ -d "$from" ] || from=$here/systemd
    for unit in "$socket" "$service"; do
        cmp --silent "$from/$unit" "$unit_files/$unit" || printf '%s\n' "$unit"
    done
}

install_units() {
    local from=$releases/$1/source/systemd
    act systemd-analyze verify --man=no "$from/$socket" "$from/$service" &&
        act install -m 644 "$from/$socket" "$from/$service" "$unit_files/" &&
        act systemctl daemon-reload
}

# Start what does not run, and let what runs give way to this version. A change of units needs a restart.
start() {
    if ! is_active "$socket" || ! is_active "$service"; then
        act systemctl start "$socket" "$service"
    elif [[ $2 == *"$socket"* ]]; then
        wait_for_transfers systemctl restart "$socket" "$service"
    elif [ -n "$2" ]; then
        wait_for_transfers systemctl restart "$service"
    elif ! serves "$1"; then
        hand_over "$1"
    fi
}

wait_for_transfers() {
    say "restarting, once the running transfers have ended (300 seconds at most)"
    act "$@"
}

# Let a new process take over. The one before goes on with its transfers; while it does, there can be no third one.
hand_over() {
    if [ -n "$dry_run" ]; then
        act systemctl reload "$service"
    elif ! poll 330 is_alone; then
        wait_for_transfers systemctl restart "$service"
    else
        # gunicorn looks each second whether it is alone.
        sleep 2
        act systemctl reload "$service" && sleep 2 && poll 30 has_begun "$1" && serves "$1"
    fi
}

# Tell whether a version serves, or has ended before it did.
has_begun() { serves "$1" || [ -z "$(processes_of "$1")" ]; }

# Print the numbers of a version's processes.
processes_of() {
    grep --files-with-matches --text --no-messages "^$releases/$1/" /proc/[0-9]*/cmdline | cut -d / -f 3
}

# Ask twice a second, for so many seconds, until a command succeeds.
poll() {
    local tries=$((2 * $1))
    shift
    until "$@"; do
        [ "$((tries -= 1))" -gt 0 ] || return 1
        sleep 0.5
    done
}

main_process() { systemctl show --property MainPID --value "$service"; }

# Tell whether the main process is of this version: the first word of its command is its Python.
serves() {
    local python
    IFS= read -r -d '' python 2>/dev/null <"/proc/$(main_process)/cmdline" && [[ $python == "$releases/$1/"* ]]
}

# Tell whether the main process is nobody's child but systemd's: after a reload it is one, until the other has ended.
is_alone() { grep -q '^PPid:[[:space:]]1$' "/proc/$(main_process)/status" 2>/dev/null; }

answers() {
    [ -n "$dry_run" ] || python3 -B "$here/preflight.py" --serving --address "$(address)" >&2
}

# After a failure: show why, and let the version before serve again.
go_back() {
    local before=$1 failed=$2 process
    journalctl --unit "$service" --lines 20 --no-pager >&2 || true
    if [ "$before" = "$failed" ]; then
        die "docker-mirror $failed does not serve; the lines above say why"
    elif [ -z "$before" ]; then
        remove_service
        die "docker-mirror $failed did not come up, and was taken away again; the lines above say why"
    fi
    for process in $(processes_of "$failed"); do
        kill "$process" 2>/dev/null || true
    done
    if activate "$before" && answers; then
        rm -rf "${releases:?}/$failed"
        die "docker-mirror $failed did not come up: $before serves; the lines above say why"
    fi
    die "docker-mirror $failed did not come up, and neither did $before; the lines above say why"
}

# Keep this version and the one before.
remove_old_releases() {
    local release
    for release in "$releases"/*/; do
        case $(basename "$release") in
            current | "$1" | "$2") ;;
            *) [ "$1" = "$2" ] || act rm -rf "$release" ;;
        esac
    done
}

remove_service() {
    local unit
    if is_active "$socket" || is_active "$service"; then
        say "stopping, once the running transfers have ended (300 seconds at most)"
    fi
    for unit in "$socket" "$service"; do
        [ ! -e "$unit_files/$unit" ] || act systemctl disable --quiet --now "$unit"
    done
    if [ -e "$unit_files/$socket" ] || [ -e "$unit_files/$service" ]; then
        act rm -f "$unit_files/$socket" "$unit_files/$service"
        act systemctl daemon-reload
    fi
    [ ! -e "$releases" ] || act rm -rf "$releases"
}

uninstall() {
    read_options "$@"
    refuse_arguments
    need_root uninstall
    changed=
    remove_service
    local path
    for path in "$settings" "$cache" "/var/cache/private/docker-mirror" "$unit_files/$socket.d" "$unit_files/$service.d"; do
        if [ ! -e "$path" ] && [ ! -L "$path" ]; then
            continue
        elif [ -n "$purge" ]; then
            act rm -rf "$path"
        else
            say "kept; to remove it: rm -rf $path"
        fi
    done
    [ -n "$changed" ] || say "docker-mirror is not installed: nothing to change"
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
        check)
            shift
            check "$@"
            ;;
        install)
            shift
            install_service "$@"
            ;;
        uninstall)
            shift
            uninstall "$@"
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
