//! The same cases through the program (RELIABILITY.md section 1.1, U7): `vellum info`, `map` and `convert` on real files give
//! the codes of the library, change no byte, leave nothing behind and do not hang on a FIFO.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vellum_tests::corpus::{Content, Expect, HostileCase, Sparse, all};
use vellum_tests::tools::vellum_binary;

/// Per verb, with the start of a process of a debug build.
const TIME_MAX: Duration = Duration::from_secs(10);
/// Disks larger than this are not converted: the target would be as large as the map of the source.
const CONVERT_MAX: u64 = 64 << 20;
/// Files longer than this cannot exist on every file system (ext4 ends at 16 TiB); the library is tested with them.
const FILE_MAX: u64 = 4 << 40;

#[test]
fn the_command_gives_the_codes_of_the_library() {
    let only = std::env::var("HOSTILE_ONLY").unwrap_or_default();
    let binary = vellum_binary();
    let cases: Vec<HostileCase> =
        all().into_iter().filter(|case| case.name.starts_with(&only) && fits(case)).collect();
    let findings: Vec<String> = std::thread::scope(|scope| {
        let parts: Vec<_> = (0..4)
            .map(|part| {
                let (cases, binary) = (&cases, &binary);
                scope.spawn(move || {
                    cases
                        .iter()
                        .skip(part)
                        .step_by(4)
                        .flat_map(|case| check(binary, case))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        parts.into_iter().flat_map(|part| part.join().expect("a checking thread")).collect()
    });
    println!("{} cases by `info`, `map` and `convert`", cases.len());
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

fn fits(case: &HostileCase) -> bool {
    case.files.iter().all(|file| !matches!(&file.content, Content::Regular(sparse) if sparse.len > FILE_MAX))
}

/// What is wrong with how the program takes a case.
fn check(binary: &Path, case: &HostileCase) -> Vec<String> {
    let root = tempfile::tempdir().expect("a temporary directory");
    // What images must not reach lies above their directory.
    fs::write(root.path().join("secret.img"), vec![b's'; 1 << 20]).expect("writing the secret");
    let directory = root.path().join("here");
    fs::create_dir(&directory).expect("a directory");
    for file in &case.files {
        lay_out(&directory.join(&file.path), &file.content);
    }
    let mut wrong = Vec::new();
    let refused = match &case.expected {
        Expect::Code(codes) => codes.iter().map(|code| code.as_str()).collect(),
        Expect::Accept(_) => Vec::new(),
    };
    let mut seen = false;
    for verb in verbs(case) {
        let (status, code, time) = run(binary, &directory, &verb);
        match code.as_deref() {
            Some(code) if refused.contains(&code) && status > 1 => seen = true,
            None if status == 0 => {}
            code => wrong.push(format!(
                "{}: {} ended with {status} and {code:?}, expected {refused:?}",
                case.name, verb[0]
            )),
        }
        if time > TIME_MAX {
            wrong.push(format!("{}: {} took {time:?}", case.name, verb[0]));
        }
    }
    if !refused.is_empty() && !seen {
        wrong.push(format!("{}: no verb refused it with {refused:?}", case.name));
    }
    for file in &case.files {
        if let Content::Regular(sparse) = &file.content
            && !unchanged(&directory.join(&file.path), sparse)
        {
            wrong.push(format!("{}: {} was changed", case.name, file.path));
        }
    }
    wrong
}

/// The verbs that a case is put through. `info` looks at the image alone; the others at the chain.
fn verbs(case: &HostileCase) -> Vec<Vec<String>> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let format = case.format.map(|format| words(&["-f", format])).unwrap_or_default();
    let with = |mut verb: Vec<String>, rest: &[&str]| {
        verb.extend(format.clone());
        verb.push("--json".into());
        verb.extend(words(rest));
        verb
    };
    let mut verbs = vec![with(words(&["info"]), &[&case.open])];
    let size = match &case.expected {
        Expect::Accept(check) => check.size,
        Expect::Code(_) => 0,
    };
    if case.name != "qcow2/one-l2-for-all" {
        verbs.push(with(words(&["map"]), &[&case.open]));
    }
    if size <= CONVERT_MAX {
        verbs.push(with(words(&["convert", "-O", "qcow2"]), &[&case.open, "../out.qcow2"]));
    }
    verbs
}

/// Status, code in the report, and time of one call.
fn run(binary: &Path, directory: &Path, arguments: &[String]) -> (i32, Option<String>, Duration) {
    let started = Instant::now();
    let output = Command::new(binary)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .expect("vellum runs");
    let time = started.elapsed();
    let _ = fs::remove_file(directory.join("../out.qcow2"));
    // The report is one document, or one line each; the error is the last.
    let text = String::from_utf8_lossy(&output.stdout);
    let whole = serde_json::from_str::<serde_json::Value>(&text).ok();
    let last = text.lines().last().and_then(|line| serde_json::from_str(line).ok());
    let code = [whole, last]
        .into_iter()
        .flatten()
        .find_map(|report| report["error"]["code"].as_str().map(str::to_owned));
    (output.status.code().unwrap_or(-1), code, time)
}

fn lay_out(path: &Path, content: &Content) {
    match content {
        Content::Regular(sparse) => write(path, sparse),
        Content::Fifo => {
            let made =
                Command::new("mkfifo").arg(path).status().expect("mkfifo runs (Debian package coreutils)");
            assert!(made.success(), "mkfifo {}", path.display());
        }
        Content::Symlink(target) => std::os::unix::fs::symlink(target, path).expect("a symbolic link"),
        Content::Directory => fs::create_dir(path).expect("a directory"),
    }
}

fn write(path: &Path, sparse: &Sparse) {
    let mut file = File::create(path).expect("creating a file");
    for (offset, bytes) in &sparse.runs {
        file.seek(SeekFrom::Start(*offset)).expect("seeking");
        file.write_all(bytes).expect("writing");
    }
    file.set_len(sparse.len).expect("setting the length");
}

/// Whether the file still is what was laid out: its length, and its bytes where there were any.
fn unchanged(path: &Path, sparse: &Sparse) -> bool {
    let file = File::open(path).expect("opening a file");
    let same = |(offset, bytes): &(u64, Vec<u8>)| {
        let mut found = vec![0u8; bytes.len()];
        file.read_exact_at(&mut found, *offset).is_ok() && found == sparse.read(*offset, bytes.len())
    };
    file.metadata().expect("attributes").len() == sparse.len && sparse.runs.iter().all(same)
}
