#!/usr/bin/env bash
# Builds the command and does its main job on the sample image: converts it, reads the result back, and shows it.
# On a fresh Debian machine with a Rust toolchain it also installs the C compiler that two compression libraries need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v cc >/dev/null; then
    as_root=()
    [[ $(id --user) -eq 0 ]] || as_root=(sudo)
    echo "installing a C compiler (Debian: gcc, libc6-dev)"
    "${as_root[@]}" apt-get update --quiet
    "${as_root[@]}" apt-get install --quiet --yes --no-install-recommends gcc libc6-dev
fi

target=${CARGO_TARGET_DIR:-target}
cargo build --locked --release --package vellum-cli
"$target/release/vellum" convert --verify --force -O qcow2 --compress examples/demo.vmdk "$target/demo.qcow2"
"$target/release/vellum" info "$target/demo.qcow2"
echo
echo "The command is $target/release/vellum; try --help."
