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
command=/usr/local/bin/docker-mirror
lock=/run/lock/docker-mirror.lock

# Options of check, install and uninstall.
dry_run=
wheels=
purge=

# Without docstrings, and the columns of tracebacks, the mirror takes 2 MB less; the unit says so too.
optimized=(PYTHONOPTIMIZE=2 PYTHONNODEBUGRANGES=1)

# The packages that bring the tests' real servers and clients.
test_packages=(docker-registry nginx skopeo podman uidmap docker.io containerd tinyproxy-bin microsocks
    redis-server shellcheck curl haproxy apache2-bin caddy chromium chromium-driver prometheus iproute2)

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
    export "${optimized[@]}" PYTHONPYCACHEPREFIX="$venv/bytecode"
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
        "$bin/coverage" report --include="$here/mirror.py" --fail-under=95
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
                use_wheels "$2"
                shift
                ;;
            --wheels=*) use_wheels "${1#*=}" ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
}

use_wheels() {
    [ -d "$1" ] || die "--wheels needs a folder"
    wheels=$(cd -- "$1" && pwd)
}

# Refuse what a command does not know: what is no option, and the options of other commands.
refuse_others() {
    [ "${#arguments[@]}" -eq 0 ] || die "unknown option: ${arguments[0]}"
    [ -z "$purge" ] || [ "$1" = uninstall ] || die "--purge is an option of uninstall"
    [ -z "$wheels" ] || [ "$1" = install ] || die "--wheels is an option of install"
}

need_root() {
    [ -n "$dry_run" ] || [ "$(id -u)" -eq 0 ] || die "root is needed: sudo ./deploy.sh $1"
}

# Two at a time would take each other's files away. The lock goes with this process.
be_the_only_one() {
    [ -n "$dry_run" ] || {
        exec 9>"$lock"
        flock --nonblock 9 || die "another install or uninstall is running"
    }
}

# Print where the mirror shall listen: the last word of the socket unit and of the owner's changes to it.
address() {
    { cat "$here/systemd/$socket" "$unit_files/$socket.d"/*.conf 2>/dev/null || true; } |
        sed -n 's/^[[:space:]]*ListenStream[[:space:]]*=[[:space:]]*\([^[:space:]]*\)[[:space:]]*$/\1/p' |
        sed '/^$/d' | tail -n 1
}

is_active() { systemctl is-active --quiet "$1" 2>/dev/null; }

check() {
    read_options "$@"
    if [ "${#arguments[@]}" -gt 0 ]; then
        check_mirror
        return
    fi
    refuse_others check
    need_python
    if is_active "$socket"; then
        python3 -B "$here/preflight.py"
    else
        python3 -B "$here/preflight.py" --address "$(address)"
    fi
}

# Walk a pull, with the command that is installed or with the one of this folder.
check_mirror() {
    local program=$releases/current/bin/docker-mirror
    if [ ! -x "$program" ]; then
        program=$venv/bin/docker-mirror
        if [ -n "$dry_run" ]; then
            [ -x "$program" ] || say "would make $venv, and install into it"
        else
            make_venv
            install_into_venv ""
        fi
    fi
    [ -n "$dry_run" ] || exec "$program" check "${arguments[@]}"
    act "$program" check "${arguments[@]}"
}

# Print the files that make a version.
sources() {
    cd "$here"
    sed -n '/^py_modules =/,/^[^ ]* =/s/^    \(.*\)/\1.py/p' setup.cfg
    printf '%s\n' setup.cfg pyproject.toml LICENSE README.md
    for folder in systemd templates; do
        [ ! -d "$folder" ] || find "$folder" -type f | sort
    done
}

# Print the extras that the owner's settings take. What is not written as usual is told by the service's start.
extras() {
    local files=("$settings/docker-mirror.env" "$unit_files/$service.d"/*.conf)
    if grep -Eqs '^[^#]*MIRROR_PULL_RATE_STORE[[:space:]]*=.*redis' "${files[@]}"; then
        printf '[redis]'
    fi
}

# Print the name of this version: its number, and a hash of its files, its extras, and the Python that it is for.
release_name() {
    local number hash
    number=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$here/mirror.py")
    hash=$(cd "$here" && { sources | xargs -d '\n' sha256sum && extras && python3 --version; } |
        sha256sum | cut -c 1-12)
    printf '%s-%s\n' "$number" "$hash"
}

install_service() {
    read_options "$@"
    refuse_others install
    need_root install
    umask 022
    be_the_only_one
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
    fi
    tell "$before" "$name"
}

tell() {
    if [ -n "$refused" ]; then
        die "not so, for it would be refused: the problems stand above"
    elif [ -z "$changed" ]; then
        say "docker-mirror $2 is installed and serves: nothing to change"
    elif [ -z "$dry_run" ]; then
        remove_old_releases "$1" "$2"
        say "docker-mirror $2 serves; its settings stand in $settings/docker-mirror.env"
    fi
}

# See whether the service can be here, with the owner's settings: nothing is touched before. A dry run goes on.
check_host() {
    local options=(--host-only)
    refused=
    is_active "$socket" || options+=(--address "$(address)")
    python3 -B "$here/preflight.py" "${options[@]}" >&2 || refused=yes
    [ -z "$refused" ] || [ -n "$dry_run" ] || die "not installed"
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
    # shellcheck disable=SC2064 # this folder, and no other
    [ -n "$dry_run" ] || trap "rm -rf '$release'; rmdir '$releases' 2>/dev/null || true" EXIT
    act rm -rf "$release"
    act mkdir -p "$release/source"
    act python3 -m venv "$release" || die "cannot make $release"
    act env -C "$here" cp --parents --target-directory "$release/source" "${files[@]}"
    act "$release/bin/pip" install --quiet --disable-pip-version-check "${options[@]}" "$release/source$(extras)" ||
        die "pip could not install; its message stands above"
    write_bytecode "$release"
    act touch "$release/complete"
    trap - EXIT
}

# Compile what a version brings, and what of Python it imports, as the service takes it: it cannot write that itself.
# Where this fails, it compiles at each start.
write_bytecode() {
    local options=(-i -C "$1" PATH="$PATH" "${optimized[@]}" PYTHONPYCACHEPREFIX="$1/bytecode")
    act env "${options[@]}" "$1/bin/python" -m compileall -qq "$1/lib" || true
    act env "${options[@]}" "$1/bin/gunicorn" --config python:wsgi --check-config wsgi:app || true
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
activate() { point_to "$1" && install_units "$1" && enable && link_command && serve "$1"; }

point_to() {
    [ "$(current)" = "$1" ] || {
        act ln -sfn "$1" "$releases/.current" && act mv -T "$releases/.current" "$releases/current"
    }
}

# Install a version's units where they differ. What was interrupted before systemd read them is made good too.
install_units() {
    local from
    from=$(units_of "$1")
    if differs "$from" "$socket" || differs "$from" "$service"; then
        act systemd-analyze verify --man=no "$from/$socket" "$from/$service" &&
            act install -m 644 "$from/$socket" "$from/$service" "$unit_files/" &&
            act systemctl daemon-reload
    elif [[ $(property NeedDaemonReload "$socket" "$service") == *yes* ]]; then
        act systemctl daemon-reload
    fi
}

# Print the folder of a version's units; a dry run has made none.
units_of() {
    local from=$releases/$1/source/systemd
    [ -d "$from" ] || from=$here/systemd
    printf '%s\n' "$from"
}

differs() { ! cmp --silent "$1/$2" "$unit_files/$2"; }

# Print a property of units.
property() {
    local name=$1
    shift
    systemctl show --timestamp=us+utc --property "$name" --value "$@" 2>/dev/null || true
}

enable() {
    local unit
    for unit in "$socket" "$service"; do
        systemctl is-enabled --quiet "$unit" 2>/dev/null || act systemctl enable --quiet "$unit" || return
    done
}

# Let the owner find the command. Another one of that name is not touched.
link_command() {
    local target=$releases/current/bin/docker-mirror
    if [ ! -e "$command" ] && [ ! -L "$command" ]; then
        act mkdir -p "$(dirname "$command")" && act ln -s "$target" "$command"
    elif [ "$(readlink "$command")" != "$target" ]; then
        say "$command is not this one's, and stays; the command is $target"
    fi
}

# Let a version serve: start it, restart it where something is new that only a start reads, or else let it take over.
serve() {
    if ! is_active "$socket" || ! is_active "$service"; then
        forget_failures
        act systemctl start "$socket" "$service"
    elif is_stale "$1" "$socket" || is_stale "$1" "$service"; then
        restart "$1"
    elif ! serves "$1"; then
        hand_over "$1"
    fi
}

# systemd starts nothing that has failed too often of late.
forget_failures() { [ -n "$dry_run" ] || systemctl reset-failed "$socket" "$service" 2>/dev/null || true; }

# Tell whether a unit runs with another text than a version has, or with what the owner has changed since it started.
is_stale() {
    local since files=()
    ! differs "$(units_of "$1")" "$2" || return 0
    since=$(property InactiveExitTimestamp "$2")
    [ -n "$since" ] || return 0
    read -r -a files <<<"$(property DropInPaths "$2")"
    files+=("$unit_files/$2" "$unit_files/$2.d")
    [ "$2" = "$socket" ] || files+=("$settings/docker-mirror.env" "$settings/credentials")
    [ -n "$(find "${files[@]}" -newerct "$since" -print -quit 2>/dev/null)" ]
}

# Restart the service, and its address too where that is new.
restart() {
    local units=("$service")
    ! is_stale "$1" "$socket" || units=("$socket" "$service")
    say "restarting, once the running transfers have ended (300 seconds at most)"
    forget_failures
    act systemctl restart "${units[@]}"
}

# Let a new process take over. The one before goes on with its transfers; while it does, there can be no third one.
hand_over() {
    if [ -n "$dry_run" ]; then
        act systemctl reload "$service"
        return
    elif ! is_alone; then
        say "waiting for the transfers of the process before the one that serves (300 seconds at most)"
        poll 330 is_alone || {
            restart "$1"
            return
        }
    fi
    sleep 2 # gunicorn looks each second whether it is alone
    act systemctl reload "$service" && sleep 2 && poll 30 has_begun "$1" && serves "$1"
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

main_process() { property MainPID "$service"; }

# Tell whether the main process is of this version: the first word of its command is its Python.
serves() {
    local python
    IFS= read -r -d '' python 2>/dev/null <"/proc/$(main_process)/cmdline" && [[ $python == "$releases/$1/"* ]]
}

# Tell whether the main process is nobody's child but systemd's: after a reload it is one, until the other has ended.
is_alone() { grep -q '^PPid:[[:space:]]1$' "/proc/$(main_process)/status" 2>/dev/null; }

answers() { [ -n "$dry_run" ] || python3 -B "$here/preflight.py" --serving >&2; }

# After a failure: show why, and let the version before serve again.
go_back() {
    local before=$1 failed=$2
    journalctl --unit "$service" --lines 20 --no-pager >&2 || true
    if [ "$before" = "$failed" ]; then
        die "docker-mirror $failed does not serve; the lines above say why"
    elif [ -z "$before" ]; then
        remove_service
        die "docker-mirror $failed did not come up, and was taken away again; the lines above say why"
    elif put_back "$before" "$failed" && answers; then
        die "docker-mirror $failed did not come up: $before serves; the lines above say why"
    fi
    die "docker-mirror $failed did not come up, and neither did $before; the lines above say why"
}

# Let the version before serve: a restart ends whatever there is of the other one. Often it has never ceased to.
put_back() {
    local before=$1 failed=$2
    point_to "$before" && install_units "$before" || return
    if ! serves "$before" || [ -n "$(processes_of "$failed")" ] ||
        is_stale "$before" "$socket" || is_stale "$before" "$service"; then
        restart "$before" || return
    fi
    rm -rf "${releases:?}/$failed"
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
    [ "$(readlink "$command")" != "$releases/current/bin/docker-mirror" ] || act rm "$command"
    [ ! -e "$releases" ] || act rm -rf "$releases"
}

uninstall() {
    read_options "$@"
    refuse_others uninstall
    need_root uninstall
    be_the_only_one
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
