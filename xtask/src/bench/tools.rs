//! The programs that the benchmarks start, and the folders they work in.

use super::Result;
use super::options::Options;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A command by the name of its program, also where a user's PATH lacks the `sbin` folders.
pub fn tool(name: &str) -> Command {
    let found =
        ["/usr/sbin", "/sbin"].iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
    let mut command = match found {
        Some(path) => Command::new(path),
        None => Command::new(name),
    };
    // Messages are quoted in reports; let them be in one language.
    command.env("LC_ALL", "C");
    command
}

/// Runs a command that must succeed, and returns what it printed. The Debian package is named if it is missing.
pub fn must(command: &mut Command) -> Result<String> {
    let text = words(command);
    let output = command.output().map_err(|error| {
        format!(
            "cannot start {text}: {error}; scripts/install-test-deps.sh installs what the benchmarks need"
        )
    })?;
    if !output.status.success() {
        return Err(format!("{text}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as typed, with file names cut to their last part.
pub fn words(command: &Command) -> String {
    let short = |word: &OsStr| match Path::new(word).file_name() {
        Some(name) if Path::new(word).is_absolute() => name.to_string_lossy().into_owned(),
        _ => word.to_string_lossy().into_owned(),
    };
    let mut text = short(command.get_program());
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&short(argument));
    }
    text
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace().join(folder),
        None => workspace().join("target"),
    }
}

/// Where disk and outputs lie unless the user says otherwise: beside the build, on the real disk.
pub fn default_directory() -> PathBuf {
    target().join("bench")
}

/// The Vellum binary: the given one, or the release build, brought up to date.
pub fn vellum(options: &Options) -> Result<PathBuf> {
    if let Some(path) = &options.vellum {
        return path.canonicalize().map_err(|error| format!("{}: {error}", path.display()));
    }
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--package", "vellum-cli"])
        .current_dir(workspace())
        .status()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if !status.success() {
        return Err("vellum-cli does not build".to_owned());
    }
    Ok(target().join("release").join("vellum"))
}
