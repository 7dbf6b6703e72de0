#!/bin/sh
# The measured guest's /init: does the job that the kernel command line names, leaves what the tools said on the last
# disk, and ends the machine.
export PATH=/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp

case "$job" in
hot-plug)
    # It ends with the machine. What comes before it listens (protocol 15, group 1) would be lost.
    uevent &
    until grep -q ' 15 .* 00000001 ' /proc/net/netlink; do :; done
    echo ready
    wait
    ;;
block)
    fio --output-format=json --output=/tmp/answer /etc/block.fio
    ;;
net)
    ip addr add "$guest/24" dev eth0
    ip link set lo up
    ip link set eth0 up
    {
        # Not the one that the shell brings.
        /usr/bin/ping -A -q -n -c "$pings" "$host"
        iperf3 --json --client "$host" --time "$seconds"
        iperf3 --json --client "$host" --time "$seconds" --reverse
    } > /tmp/answer
    ;;
esac
dd if=/tmp/answer of="$answer" bs=1M conv=sync,fsync
reboot -f
