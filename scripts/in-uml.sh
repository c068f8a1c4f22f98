#!/usr/bin/env bash
# Runs a command in a Linux kernel of its own: for what the kernel of this machine may lack, the loopback of vsock.
#
#   scripts/in-uml.sh COMMAND [ARGUMENT...]
#
# The kernel is Debian's user-mode-linux, a program like any other: no privileges are needed, it starts in seconds, and it sees
# the files of this machine. Standard input is empty. The exit code is that of the command; 127 without the
# packages, 125 if the kernel could not be started, 124 after ten minutes.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 125
fi
if ! command -v linux.uml >/dev/null || [[ ! -x /sbin/insmod ]]; then
    echo "$0: the packages user-mode-linux and kmod are needed: scripts/install-test-deps.sh installs them" >&2
    exit 127
fi

work=$(mktemp --directory)
trap 'rm --recursive --force "$work"' EXIT
printf '%q ' "$@" >"$work/command"
cat >"$work/init" <<INIT
#!/bin/bash
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=$(printf %q "$HOME")
# Without it, /proc is that of the machine, and what is written there is meant for this kernel only.
mount -t proc proc /proc || exit 1
mount -t sysfs sysfs /sys
mountpoint --quiet /dev || mount -t devtmpfs devtmpfs /dev
modules=/usr/lib/uml/modules/\$(uname -r)/kernel/net/vmw_vsock
for module in vsock vmw_vsock_virtio_transport_common vsock_loopback; do
    insmod "\$modules/\$module.ko"
done
ip link set lo up 2>/dev/null
cd $(printf %q "$PWD")
command=\$(cat $work/command)
echo 0 >/proc/sys/kernel/printk
(eval "\$command") </dev/null
echo \$? >$work/code
sync
echo o >/proc/sysrq-trigger
sleep 60
INIT
chmod +x "$work/init"

code=0
timeout --kill-after=5 600 linux.uml mem=1G root=/dev/root rootfstype=hostfs rootflags=/ rw "init=$work/init" \
    con=null con0=null,fd:1 quiet loglevel=1 </dev/null || code=$?
if [[ $code -eq 124 || $code -eq 137 ]]; then
    echo "$0: stopped after ten minutes" >&2
    exit 124
fi
if [[ ! -s $work/code ]]; then
    echo "$0: the kernel did not start, or did not come to its end" >&2
    exit 125
fi
exit "$(cat "$work/code")"
