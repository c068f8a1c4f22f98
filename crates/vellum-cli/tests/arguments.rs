//! Arguments that are wrong or strange, and outputs that do not take a report: for all verbs.

mod common;
use common::{Dir, Ran};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;

#[test]
fn help_and_version_go_to_standard_output() {
    let dir = Dir::new();
    dir.vellum(&["--version"]).exits(0).shows(env!("CARGO_PKG_VERSION"));
    let help = dir.vellum(&["--help"]).exits(0).shows("Exit codes:");
    let verbs = [
        "info", "create", "convert", "compare", "map", "digest", "check", "repair", "snapshot", "io",
        "bench", "channel", "formats",
    ];
    for verb in verbs {
        assert!(help.out.contains(verb));
        dir.vellum(&[verb, "--help"]).exits(0).shows("Examples:").shows(&format!("vellum {verb}"));
    }
    for action in ["list", "create", "apply", "delete"] {
        let help = dir.vellum(&["snapshot", action, "--help"]).exits(0).shows("Examples:");
        assert!(help.out.contains(&format!("  vellum snapshot {action} ")), "{help:?}");
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    let dir = Dir::new();
    dir.vellum(&[]).exits(2).says("Usage:");
    dir.vellum(&["imfo", "x"]).exits(2).says("imfo").says("info");
    dir.vellum(&["convert", "a"]).exits(2).says("TARGET");
    dir.vellum(&["convert", "a", "b", "--sparse-size", "100"]).exits(2).says("512");
    dir.vellum(&["convert", "a", "b.img", "--threads", "0"]).exits(2).says("threads");
    let ran = dir.vellum(&["info", "--json", "--nonsense", "a"]).exits(2);
    assert_eq!(ran.err, "");
    let error = ran.any_json();
    assert_eq!((&error["error"]["code"], &error["error"]["kind"]), (&"USAGE".into(), &"misuse".into()));
    assert!(error["error"]["message"].as_str().unwrap().contains("--nonsense"));
}

#[test]
fn no_argument_makes_it_panic() {
    let dir = Dir::new();
    dir.write("a.img", &[0; 4096]);
    let strange: [OsString; 10] = [
        "".into(),
        "-".into(),
        "--".into(),
        ".".into(),
        "/dev/null".into(),
        "/proc/self/mem".into(),
        "\u{202e}\n\t\x07".into(),
        "a".repeat(5000).into(),
        "nbd://localhost/x".into(),
        OsString::from_vec(b"\xff\xfe".to_vec()),
    ];
    let before: &[&[&str]] = &[
        &["info"],
        &["info", "-f"],
        &["create", "-O"],
        &["create", "-o"],
        &["digest"],
        &["map"],
        &["formats"],
        &["compare", "a.img"],
        &["convert", "a.img", "-O", "raw"],
        &["convert", "a.img", "b.img", "--level"],
        &["convert", "a.img", "b.img", "--parent"],
        &[],
    ];
    for verb in before {
        for word in &strange {
            let output = dir.command(verb).arg(word).output().unwrap();
            let ran = Ran::new(output);
            assert!((0..=6).contains(&ran.code), "{verb:?} {word:?}: {ran:?}");
        }
    }
}

#[test]
fn an_output_that_is_full_is_an_error_and_a_closed_one_no_panic() {
    let dir = Dir::new();
    dir.write("a.img", &[0; 4096]);
    for arguments in [&["info", "a.img"][..], &["formats"], &["map", "--json", "a.img"], &["--help"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = dir.command(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        Ran::new(output).exits(4).says("standard output");
    }
    let vellum = env!("CARGO_BIN_EXE_vellum");
    let script = format!("'{vellum}' info a.img >&- 2>&-; echo $?; '{vellum}' info gone >&- 2>&-; echo $?");
    let output =
        std::process::Command::new("sh").args(["-c", &script]).current_dir(dir.path("")).output().unwrap();
    let ran = Ran::new(output).exits(0);
    assert!(!ran.out.contains("101") && ran.out.contains('3'), "{ran:?}");
}
