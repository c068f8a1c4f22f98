//! What the tests of all verbs share: a directory, the real binary in it, and `qemu-img` beside it.
#![allow(dead_code)]

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

/// A temporary directory in which commands run.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Dir(tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `vellum` with `arguments`, not yet started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vellum"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command.env_remove("NO_COLOR").env_remove("TERM").env("LC_ALL", "C");
        command
    }

    /// Runs `vellum` to its end.
    pub fn vellum(&self, arguments: &[&str]) -> Ran {
        Ran::new(self.command(arguments).output().expect("vellum runs"))
    }

    /// Starts `vellum` and leaves it running.
    pub fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vellum starts")
    }

    /// Runs `qemu-img`, which must succeed.
    pub fn qemu_img(&self, arguments: &[&str]) -> String {
        let output = Command::new("qemu-img").args(arguments).current_dir(self.0.path()).output();
        let output = output.expect("qemu-img runs (Debian package qemu-utils)");
        let ran = Ran::new(output);
        assert_eq!(ran.code, 0, "qemu-img {arguments:?}: {}{}", ran.out, ran.err);
        ran.out
    }

    /// Runs `qemu-io` commands on an image of `format` (QEMU's name); they must succeed, and find their patterns.
    pub fn qemu_io(&self, format: &str, image: &str, commands: &[&str]) -> String {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).current_dir(self.0.path());
        for one in commands {
            command.args(["-c", one]);
        }
        let output = command.arg(image).output().expect("qemu-io runs (Debian package qemu-utils)");
        let ran = Ran::new(output);
        let failed = ran.code != 0 || ran.out.contains("failed") || ran.out.contains("can't");
        assert!(!failed, "qemu-io {commands:?} {image}: {ran:#?}");
        ran.out
    }

    /// Runs `vellum io` with `commands` and more arguments.
    pub fn io(&self, image: &str, more: &[&str], commands: &[&str]) -> Ran {
        let mut arguments = vec!["io", image];
        arguments.extend(more);
        commands.iter().for_each(|command| arguments.extend(["-c", *command]));
        self.vellum(&arguments)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).expect("the file is written");
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("the file is there")
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    /// Names of all files.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("the directory is there");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// A raw disk of `mib` MiB: data in every fourth MiB and at the end, zeros between.
    pub fn raw_disk(&self, name: &str, mib: usize) -> Vec<u8> {
        let mut content = vec![0; mib << 20];
        for (index, part) in content.chunks_mut(1 << 20).enumerate() {
            if index % 4 == 0 || index + 1 == mib {
                noise(index as u64 + 1, &mut part[4096..300_000]);
            }
        }
        self.write(name, &content);
        content
    }

    /// The tree digest of a disk.
    pub fn digest(&self, name: &str) -> String {
        let report = self.vellum(&["digest", "--json", name]).json();
        report["digest"].as_str().expect("a digest").to_owned()
    }
}

/// The formats, and what QEMU calls them.
pub const FORMATS: [(&str, &str); 5] =
    [("raw", "raw"), ("vdi", "vdi"), ("vhd", "vpc"), ("vmdk", "vmdk"), ("qcow2", "qcow2")];

/// Reads and writes at random places of a disk of 32 MiB, verified at the end.
pub fn script(seed: u64, count: u64) -> String {
    let mut state = seed;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut script = String::new();
    for number in 0..count {
        let (offset, length) = (random(31 << 20), [512, 4096, 5000, 65536, 300_000][random(5) as usize]);
        let line = match random(8) {
            0 => format!("write -q -z {offset} {length}"),
            1 => format!("write -q -z -u {offset} {length}"),
            2 => format!("write -q -P 0 {offset} {length}"),
            3 => "flush -q".to_owned(),
            _ => format!("write -q -S {number} {offset} {length}"),
        };
        script.push_str(&line);
        script.push('\n');
    }
    script + "verify\nreopen -q\nverify\n"
}

/// Fills `bytes` with what hardly compresses, the same for the same seed.
pub fn noise(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// What a command left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn new(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let status = output.status;
        // Ended by a signal: as shells say it.
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
        let ran = Ran { code: code.unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) };
        assert!(!ran.err.contains("panicked"), "{ran:?}");
        ran
    }

    /// Asserts the exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// The report of a command that succeeded.
    #[track_caller]
    pub fn json(self) -> Value {
        self.exits(0).any_json()
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn any_json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    /// Asserts that standard error holds `text`.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.err.contains(text), "no {text:?} in {self:#?}");
        self
    }

    /// Asserts that standard output holds `text`.
    #[track_caller]
    pub fn shows(self, text: &str) -> Self {
        assert!(self.out.contains(text), "no {text:?} in {self:#?}");
        self
    }
}
