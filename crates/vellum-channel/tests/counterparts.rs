//! The table of counterparts lists the whole header, and tests that exist.

use std::fs;
use std::path::Path;

const TABLE: &str = include_str!("../src/counterparts.md");

/// The functions of `io/channel.h`, without their prefix.
const FUNCTIONS: [&str; 33] = [
    "has_feature",
    "set_feature",
    "set_name",
    "readv_full",
    "writev_full",
    "readv_all_eof",
    "readv_all",
    "writev_all",
    "readv",
    "writev",
    "read",
    "write",
    "read_all_eof",
    "read_all",
    "write_all",
    "set_blocking",
    "close",
    "shutdown",
    "set_delay",
    "set_cork",
    "io_seek",
    "create_watch",
    "add_watch",
    "add_watch_full",
    "add_watch_source",
    "attach_aio_context",
    "detach_aio_context",
    "yield",
    "wait",
    "set_aio_fd_handler",
    "readv_full_all_eof",
    "readv_full_all",
    "writev_full_all",
];

const CALLBACKS: [&str; 10] = [
    "io_writev",
    "io_readv",
    "io_close",
    "io_create_watch",
    "io_set_blocking",
    "io_shutdown",
    "io_set_cork",
    "io_set_delay",
    "io_seek",
    "io_set_aio_fd_handler",
];

#[test]
fn every_function_of_the_header_is_listed() {
    let functions = FUNCTIONS.iter().map(|name| format!("`qio_channel_{name}`"));
    for name in functions.chain(CALLBACKS.iter().map(|name| format!("| `{name}`"))) {
        assert!(TABLE.contains(&name), "{name} is not in src/counterparts.md");
    }
}

/// The functions that a line names in its second column: `readv` of [`ChannelExt::readv`].
fn counterparts(line: &str) -> impl Iterator<Item = &str> {
    let column = line.split('|').nth(2).unwrap_or_default();
    column.split('`').filter_map(|part| part.rsplit_once("::")).map(|(_, name)| name)
}

fn calls(body: &str, name: &str) -> bool {
    body.contains(&format!(".{name}(")) || body.contains(&format!("::{name}("))
}

#[test]
fn every_test_that_is_named_exists_and_calls_what_it_is_named_for() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    let is_row = |line: &&str| line.starts_with("| `") && !line.starts_with("| `io/channel.h`");
    for line in TABLE.lines().filter(is_row) {
        let test = line.trim_end_matches([' ', '|']).rsplit('|').next().expect("a last column");
        let path: Vec<_> = test.trim().trim_matches('`').split("::").collect();
        let (file, function) = match path[..] {
            ["conformance", module, function] => {
                (root.join(format!("../vellum-conformance/src/channel/{module}.rs")), function)
            }
            [folder, file, function] => (root.join(format!("tests/{folder}/{file}.rs")), function),
            _ => panic!("no test is named in {line}"),
        };
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let Some(begin) = text.find(&format!("fn {function}(")) else {
            panic!("{} has no {function}", file.display());
        };
        let body = text[begin..].split("\n}\n").next().unwrap_or_default();
        if line.starts_with("| `qio_channel_") && !line.contains("| none is needed") {
            assert!(counterparts(line).any(|name| calls(body, name)), "{function} calls nothing of {line}");
        }
        named += 1;
    }
    assert!(named > 50, "{named} lines");
}
