#!/usr/bin/env bash
# Install docker-mirror on a fresh Debian with a real systemd, and see what becomes of it: test_host.py says what.
# It wants root, apt-get, and the .venv that ./deploy.sh test makes. Options go to pytest.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venv/bin/python
lock=/run/lock/docker-mirror-host-tests.lock
packages=(debootstrap systemd-container docker-registry nginx skopeo docker.io containerd)

# In CI nothing may skip.
skip() {
    printf 'tests/host/run.sh: skipped: %s\n' "$*" >&2
    [ "${CI:-}" != true ] || exit 1
    exit 0
}

# Print the address of the Debian packages that this machine uses itself, such as those of its point release.
debian_mirror() {
    apt-get indextargets --format "\$(CODENAME) \$(REPO_URI)" 'Created-By: Packages' 'Origin: Debian' 'Component: main' |
        awk '$1 !~ /-/ && !found { print $2; found = 1 }'
}

[ "$(id -u)" -eq 0 ] || skip "it needs root"
command -v apt-get >/dev/null || skip "it needs apt-get"
[ -x "$python" ] || skip "it needs .venv: run ./deploy.sh test first"
mirror=$(debian_mirror)
[ -n "$mirror" ] || skip "it needs Debian's packages among those of apt-get"
dpkg-query --show "${packages[@]}" >/dev/null 2>&1 ||
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}" >/dev/null ||
    skip "it needs the packages ${packages[*]}"

# Two trees that are booted would share this machine's addresses and control groups.
exec 9>"$lock"
flock --nonblock 9 || {
    printf 'tests/host/run.sh: waiting for another run of it\n' >&2
    flock --timeout 1800 9 || skip "another run of it does not end"
}

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
timeout 600 debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,sudo,python3 \
    bookworm "$work/tree" "$mirror" >"$work/debootstrap.log" &
debootstrap=$!

# A clone, and all packages that it takes: the wheels are for Debian 12's Python.
mkdir "$work/clone" "$work/wheels"
git -C "$root" ls-files -coz --exclude-standard |
    tar --create --directory "$root" --null --ignore-failed-read --files-from - | tar --extract --directory "$work/clone"
"$python" -m pip wheel --quiet --wheel-dir "$work/wheels" "$work/clone" 'setuptools>=68'
rm "$work"/wheels/docker_mirror-*
wait "$debootstrap" || {
    tail "$work/debootstrap.log" >&2
    skip "debootstrap made no tree from $mirror"
}

mkdir "$work/tree/root/wheels"
cp -r "$work/clone" "$work/tree/root/docker-mirror"
cp "$work"/wheels/* "$work/tree/root/wheels/"
cd "$root"
HOST_TREE=$work/tree timeout 600 "$python" -m pytest tests/host "$@"
