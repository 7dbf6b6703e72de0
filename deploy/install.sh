#!/bin/sh
# Installs a tree that `make dist` staged, or removes it again. `make install` and `make uninstall` call this, and so does
# the installer's image on a node (deploy/README.md).
#
#   install.sh install | uninstall
#
# Taken from the environment:
#   DIST        the staged tree (install only)
#   DESTDIR     the root of the system to install on; empty is this one
#   PREFIX      where programs, kernel and image go; /usr unless it is set
#   CONTAINERD  1 adds the runtime to containerd's configuration, else what to add is printed
#   FORCE       1 uninstalls although pods run
set -eu

DESTDIR=${DESTDIR:-}
DESTDIR=${DESTDIR%/}
PREFIX=${PREFIX:-/usr}
PREFIX=${PREFIX%/}

PROGRAMS='containerd-shim-kata-v2 kata-ctl dragonball'
IMAGES='vmlinux kata-containers.img'
BIN=$PREFIX/bin
SHARE=$PREFIX/share/kata-containers
DEFAULTS=$PREFIX/share/defaults/kata-containers
# Where the runtime looks for its configuration, besides /usr/share/defaults/kata-containers.
SYSTEM=/etc/kata-containers

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

case $PREFIX in
    /*) ;;
    *) fail "PREFIX=$PREFIX is not an absolute path; give one, such as /opt/tatami" ;;
esac
# These go into a configuration file and into a pattern of sed.
case $PREFIX in
    *[!A-Za-z0-9/._-]*) fail "PREFIX=$PREFIX has characters other than letters, digits, '/', '.', '_' and '-'" ;;
esac

# place MODE TARGET: puts standard input there at once, as a new file. Pods that run have the old ones open.
place() {
    mkdir -p "$(dirname "$DESTDIR$2")"
    new=$(mktemp "$DESTDIR$2.XXXXXX")
    if cat > "$new" && chmod "$1" "$new" && mv -f "$new" "$DESTDIR$2"; then
        return
    fi
    rm -f "$new"
    fail "could not write $DESTDIR$2"
}

# kata_ctl ARGUMENTS: the installed one. containerd finds the shim by itself in the usual places only.
kata_ctl() {
    set -- "$@" --destdir "${DESTDIR:-/}"
    case $BIN in
        /usr/bin | /usr/local/bin) ;;
        *) set -- "$@" --runtime-path "$BIN/containerd-shim-kata-v2" ;;
    esac
    "$DESTDIR$BIN/kata-ctl" "$@"
}

install_all() {
    [ -n "${DIST:-}" ] || fail 'set DIST to the tree that `make dist` staged'
    for name in $PROGRAMS; do
        [ -x "$DIST/usr/bin/$name" ] || fail "$DIST/usr/bin/$name is missing; run \`make dist\`"
    done
    for name in $IMAGES; do
        [ -f "$DIST/usr/share/kata-containers/$name" ] || fail "$DIST has no $name; run \`make dist\`"
    done
    # What names others comes after them: whoever starts a pod meanwhile finds the old ones or the new ones.
    for name in $IMAGES; do
        place 644 "$SHARE/$name" < "$DIST/usr/share/kata-containers/$name"
    done
    sed "s|/usr/share/kata-containers|$SHARE|g; s|/usr/share/defaults/kata-containers|$DEFAULTS|g" \
        "$DIST/usr/share/defaults/kata-containers/configuration.toml" | place 644 "$DEFAULTS/configuration.toml"
    for name in $PROGRAMS; do
        place 755 "$BIN/$name" < "$DIST/usr/bin/$name"
    done
    if [ "$PREFIX" != /usr ] && [ ! -e "$DESTDIR$SYSTEM/configuration.toml" ] && [ ! -L "$DESTDIR$SYSTEM/configuration.toml" ]; then
        mkdir -p "$DESTDIR$SYSTEM"
        ln -s "$DEFAULTS/configuration.toml" "$DESTDIR$SYSTEM/configuration.toml"
    fi
    if [ "${CONTAINERD:-0}" = 1 ]; then
        kata_ctl containerd add
    else
        echo 'ctr and nerdctl find the runtime by its type, io.containerd.kata.v2. For the CRI (Kubernetes), run'
        echo "\`kata-ctl containerd add\`, or add this to containerd's configuration and restart it:"
        echo
        kata_ctl containerd show
    fi
}

uninstall_all() {
    if [ -x "$DESTDIR$BIN/kata-ctl" ]; then
        # containerd needs the shim to delete them.
        if [ -z "$DESTDIR" ] && [ "${FORCE:-0}" != 1 ] && [ "$("$BIN/kata-ctl" list --json)" != '[]' ]; then
            fail 'there are sandboxes on this node (kata-ctl list); end them first, or set FORCE=1'
        fi
        kata_ctl containerd remove
    fi
    for name in $PROGRAMS; do
        rm -f "$DESTDIR$BIN/$name"
    done
    for name in $IMAGES; do
        rm -f "$DESTDIR$SHARE/$name"
    done
    rm -f "$DESTDIR$DEFAULTS/configuration.toml"
    if [ "$(readlink "$DESTDIR$SYSTEM/configuration.toml")" = "$DEFAULTS/configuration.toml" ]; then
        rm -f "$DESTDIR$SYSTEM/configuration.toml"
    fi
    # What somebody else has put there stays, and a configuration of the administrator's does.
    for directory in "$SHARE" "$DEFAULTS" "$PREFIX/share/defaults" "$SYSTEM"; do
        [ ! -d "$DESTDIR$directory" ] || rmdir --ignore-fail-on-non-empty "$DESTDIR$directory"
    done
    if [ "$PREFIX" != /usr ] && [ "$PREFIX" != /usr/local ]; then
        for directory in "$BIN" "$PREFIX/share" "$PREFIX"; do
            [ ! -d "$DESTDIR$directory" ] || rmdir --ignore-fail-on-non-empty "$DESTDIR$directory"
        done
    fi
}

case ${1:-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) fail 'say install or uninstall' ;;
esac
