#!/bin/sh
# What the installer's pod runs on each node: installs or uninstalls on the node's root file system, which is mounted at
# /host, and has containerd read its configuration again if that changed. Pods that run go on running meanwhile.
set -eu

ACTION=${ACTION:-install}
export DIST=/dist DESTDIR=/host PREFIX="${PREFIX:-/opt/tatami}" CONTAINERD=1

# In a variable, so that a failure ends this script.
said=$(/install.sh "$ACTION")
echo "$said"
case $said in
    *'changed /'*)
        # The node's own systemd, through the first process of the node.
        nsenter --target 1 --mount -- systemctl restart containerd
        echo 'containerd was restarted'
        ;;
esac
if [ "$ACTION" = install ]; then
    # Errors are shown in the pod's log, and end it: the DaemonSet is not ready then.
    nsenter --target 1 --mount -- "$PREFIX/bin/kata-ctl" check
fi
echo "$ACTION is done"
# A DaemonSet's pod has to stay. The signal that ends it ends the wait.
trap 'exit 0' TERM INT
sleep infinity &
wait
