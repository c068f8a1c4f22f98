#!/usr/bin/env bash
# All I/O goes through vellum-core's traits, so that tests can replace the machine. `std::fs` may stand only in vellum-io
# (the implementation), in vellum-channel (files, Unix socket paths and certificates are the machine's there), in the
# command (its glue), in xtask and in tests (vellum-conformance is tests only). Prints each breach and fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Looks at each file up to its test module: `#[cfg(test)]` before a `mod` that opens a block there. Comments do not count.
# shellcheck disable=SC2016  # the dollars are awk's
breaches=$(
    find crates -name '*.rs' \
        -not -path 'crates/vellum-io/*' -not -path 'crates/vellum-channel/*' -not -path 'crates/vellum-cli/*' -not -path 'crates/vellum-conformance/*' \
        -not -path '*/tests/*' -not -path '*/target/*' -not -name '*tests.rs' -print0 |
        sort --zero-terminated |
        xargs --null awk '
            FNR == 1 { in_tests = 0; previous = "" }
            previous ~ /#\[cfg\((all\()?test/ && /^mod [a-z_]+ \{/ { in_tests = 1 }
            { previous = $0 }
            in_tests || /^[[:space:]]*\/\// { next }
            /std::(fs[^a-z_0-9]|fs$|\{([^}]*[ ,{])?fs[^a-z_0-9])/ || /^[[:space:]]*(tokio|async_std)::fs/ {
                printf "%s:%d: %s\n", FILENAME, FNR, $0
            }'
)
if [[ -n $breaches ]]; then
    echo "std::fs outside vellum-io, the command, xtask and tests (reach files through Storage and Resolver):" >&2
    echo "$breaches" >&2
    exit 1
fi
