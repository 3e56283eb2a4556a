#!/usr/bin/env bash
# Runs the README's two commands in bare Debian systems, as a user who is not root: nothing is there but Python, git,
# make and certificates. As root, with debootstrap installed and 30 GB free:
#
#     tests/bare.sh [RELEASE ...]    # bookworm (Python 3.11) and trixie (3.13) unless named
#
# What is committed is cloned. BARE is the folder to work in (/var/tmp/aliprod-bare), MIRROR a mirror of Debian's.
# Each release leaves its system and its log there; the last lines printed are the seconds of each command.
set -euo pipefail

[ "$(id -u)" = 0 ] || { echo "tests/bare.sh needs root: it makes systems and mounts" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "tests/bare.sh needs debootstrap: apt install debootstrap" >&2; exit 2; }

repository=$(cd "$(dirname "$0")/.." && pwd)
export bare=${BARE:-/var/tmp/aliprod-bare}
[ $# -gt 0 ] || set -- bookworm trixie

make_system() { # release
    local home=$bare/$1/home/user
    rm -rf --one-file-system "${bare:?}/$1"
    debootstrap --variant=minbase --include=python3,python3-venv,git,make,ca-certificates \
        "$1" "$bare/$1" ${MIRROR:+"$MIRROR"}

    chroot "$bare/$1" useradd --create-home user
    git clone --quiet "$repository" "$home/aliprod"
    mkdir -p "$home/.cache/pip"
    chroot "$bare/$1" chown -R user: /home/user
    chown --reference="$home" "$bare/cache" # pip's, of all systems: the second downloads half as much
    cp "$bare/pip.conf" "$bare/$1/etc/pip.conf"
}

run() { # release, command; in a namespace of its own, so that mounts and processes are gone when it ends, however it ends
    set -eu
    mount -t proc proc "$bare/$1/proc"
    mount --rbind /dev "$bare/$1/dev"
    mount --bind "$bare/cache" "$bare/$1/home/user/.cache/pip"

    while read -r path; do
        if [ -d "$path" ]; then
            mkdir -p "$bare/$1$path"
        else
            mkdir -p "$(dirname "$bare/$1$path")" && touch "$bare/$1$path"
        fi
        mount --bind -o ro "$path" "$bare/$1$path"
    done <"$bare/shown"

    proxies=()
    for name in http_proxy https_proxy no_proxy; do
        [ -z "${!name:-}" ] || proxies+=("$name=${!name}")
    done
    exec chroot --userspec=user:user "$bare/$1" \
        env -i HOME=/home/user PATH=/usr/local/bin:/usr/bin:/bin "${proxies[@]}" \
        sh -c "cd && cd aliprod && $2" </dev/null
}
export -f run

# pip's settings here are its settings there, and the files and folders that they name are shown there.
mkdir -p "$bare/cache"
{
    echo "[global]"
    python3 -m pip config list | sed -E "s/^[^.]+\.\.?([^=]+)='(.*)'$/\1 = \2/" | sort --unique --stable --key=1,1
} >"$bare/pip.conf"
tr ' ' '\n' <"$bare/pip.conf" | while read -r word; do
    case $word in file://*) word=$(dirname "${word#file://}") ;; esac # an index stands beside its files
    case $word in /*) if [ -e "$word" ]; then echo "$word"; fi ;; esac
done | sort --unique >"$bare/shown"

failed=0 results=()
for release; do
    log=$bare/$release.log
    echo "$release: see $log"
    make_system "$release" >"$log" 2>&1

    for command in "make demo" "make test"; do
        start=$SECONDS status=0
        echo "== $command" >>"$log"
        unshare --mount --pid --fork --kill-child bash -c 'run "$@"' - "$release" "$command" >>"$log" 2>&1 || status=$?

        results+=("$release, $(chroot "$bare/$release" python3 --version), $command: ended $status, $((SECONDS - start)) s")
        [ "$status" = 0 ] || failed=1
    done
done
printf '%s\n' "${results[@]}" | tee "$bare/results"
exit "$failed"
