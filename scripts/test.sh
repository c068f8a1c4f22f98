#!/usr/bin/env bash
# Everything that must pass before a change is merged. Installs what the tests need; run it from anywhere in the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

summary=()

step() {
    local name=$1 began=$SECONDS
    shift
    echo
    echo "== $name"
    "$@"
    summary+=("$(printf '%6d s  %s' "$((SECONDS - began))" "$name")")
}

lint() {
    cargo clippy --locked --workspace --all-targets -- --deny warnings
}

documentation() {
    RUSTDOCFLAGS='--deny warnings' cargo doc --locked --workspace --no-deps --quiet
}

# The completion's hand-over between threads, in every interleaving. Another cfg means another build of the dependencies, so
# it has a target folder of its own, and the two builds do not throw each other out.
loom() {
    local models=(cargo test --locked --package vellum-core --release --lib loom_tests)
    local -x RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/loom LOOM_MAX_PREEMPTIONS=3
    # A filter that fits nothing would pass.
    "${models[@]}" -- --list | grep ': test$' >/dev/null
    "${models[@]}"
}

step 'test dependencies' scripts/install-test-deps.sh
step 'formatting' cargo fmt --all --check
step 'seams: no std::fs outside vellum-io' scripts/check-seams.sh
step 'clippy' lint
step 'tests' cargo test --locked --workspace
step 'loom' loom
step 'documentation' documentation

echo
printf '%s\n' "${summary[@]}"
printf '%6d s  in all\n' "$SECONDS"
