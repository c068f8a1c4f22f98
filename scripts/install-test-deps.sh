#!/usr/bin/env bash
# Installs the Debian packages that the tests and the benchmarks use. This is the one list: whatever else needs it
# (CI, an image, a contributor's machine) calls this script.
set -euo pipefail

# One line a package: what it is for. A version from backports is as good as the release's own.
packages=(
    qemu-utils      # qemu-img, qemu-io: the reference for every format
    libvmdk-utils   # vmdkinfo: a second opinion on VMDK
    libvhdi-utils   # vhdiinfo: a second opinion on VHD
    libqcow-utils   # qcowinfo: a second opinion on qcow2
    python3         # runs the next three, which read guest data
    python3-libvmdk # a second reader of VMDK
    python3-libvhdi # a second reader of VHD
    python3-libqcow # a second reader of qcow2
    python3-websockets # the other end of WebSocket channels
    openssl         # the other end of TLS channels: s_client, s_server
    socat           # the other end of sockets and commands
    user-mode-linux # a kernel with the loopback of vsock, where this one has none (scripts/in-uml.sh)
    kmod            # insmod, in that kernel
    fdisk           # sfdisk: partition tables of the disks that the tests and benchmarks build
    e2fsprogs       # mke2fs -d: file systems filled without root
    btrfs-progs     # mkfs.btrfs: reflinks
    xfsprogs        # mkfs.xfs: reflinks, and files above 16 TiB
    mount           # mount and umount of loop devices
    util-linux      # findmnt
    gcc             # libdeflate and zstd are C; also the linker
    libc6-dev
)

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then
    echo "test dependencies: all ${#packages[@]} packages are installed"
    exit 0
fi

if [[ $(id --user) -eq 0 ]]; then
    as_root=(env)
elif command -v sudo >/dev/null; then
    as_root=(sudo env)
else
    echo "these packages are missing, and this is neither root nor a machine with sudo: ${missing[*]}" >&2
    exit 1
fi

echo "test dependencies: installing ${missing[*]}"
"${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get update --quiet
"${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${missing[@]}"
