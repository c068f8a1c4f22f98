//! How an error is shown, and the exit codes. The table of exit codes is in `docs/cli.md` and `vellum --help`.

use crate::terminal::{Style, Terminal};
use crate::text::clean;
use serde::Serialize;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use vellum::{Code, Error, Kind};

/// What the process says when it ends. Stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus(u8);

impl ExitStatus {
    /// Done; for compare: the disks are the same.
    pub const DONE: Self = ExitStatus(0);
    /// The disks differ; for io: what was read is not what was expected.
    pub const DIFFERENT: Self = ExitStatus(1);
    /// check: the image could not be checked.
    pub const CHECK_IMPOSSIBLE: Self = ExitStatus(1);
    /// check: there are errors.
    pub const CHECK_ERRORS: Self = ExitStatus(2);
    /// check: there are leaks and nothing worse.
    pub const CHECK_LEAKS: Self = ExitStatus(3);
    /// The command line is wrong.
    pub const USAGE: Self = ExitStatus(2);
    /// An image is damaged.
    pub const DAMAGED: Self = ExitStatus(5);
    const NOT_FOUND: Self = ExitStatus(3);
    const MACHINE: Self = ExitStatus(4);
    const REFUSED: Self = Self::DAMAGED;
    const BUSY: Self = ExitStatus(6);

    /// As shells report a process that a signal ended.
    pub fn of_signal(signal: usize) -> Self {
        ExitStatus(u8::try_from(signal).map_or(u8::MAX, |number| number.saturating_add(128)))
    }

    /// What `vellum check` ends with instead, where its codes have another meaning.
    pub fn of_failed_check(self) -> Self {
        match self.0 {
            130.. => self,
            _ => Self::CHECK_IMPOSSIBLE,
        }
    }

    fn of(error: &Error) -> Self {
        match (error.code(), error.kind()) {
            (Code::Permission, _) => Self::MACHINE,
            (_, Kind::Misuse) => Self::USAGE,
            (_, Kind::NotFound) => Self::NOT_FOUND,
            (_, Kind::Busy) => Self::BUSY,
            (_, Kind::Damaged | Kind::NotImplemented | Kind::NotAllowed) => Self::REFUSED,
            (_, Kind::Cancelled) => Self::of_signal(2),
            _ => Self::MACHINE,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        ExitCode::from(status.0)
    }
}

/// Why a verb ended early.
#[derive(Debug)]
pub enum Failure {
    /// An error of the library, or of the command line.
    Error(Error),
    /// A signal stopped the job; the error says in what state.
    Signal(usize, Error),
    /// A signal ended what nothing else ends; all is said.
    Stopped(usize),
    /// An error that is a part of the report already.
    Reported(Error),
    /// Standard output does not take the report.
    Output(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Output(error)
    }
}

impl Failure {
    /// Shows what happened; the status is what the process ends with.
    pub fn show(self, terminal: &Terminal) -> ExitStatus {
        match self {
            // The reader has seen enough.
            Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe => ExitStatus::DONE,
            Failure::Output(error) => {
                let error = Error::from_io(error, "the report cannot be written to standard output");
                terminal.to_stderr(|out, style| write_error(out, style, &error));
                ExitStatus::MACHINE
            }
            Failure::Error(error) => {
                show_error(terminal, &error);
                ExitStatus::of(&error)
            }
            Failure::Reported(error) => ExitStatus::of(&error),
            Failure::Stopped(signal) => ExitStatus::of_signal(signal),
            Failure::Signal(signal, error) => {
                show_error(terminal, &error);
                ExitStatus::of_signal(signal)
            }
        }
    }
}

fn show_error(terminal: &Terminal, error: &Error) {
    if terminal.wants_json() {
        // Who asked for JSON and does not take it cannot be told.
        let _ = terminal.json(&ErrorReport { error: ErrorBody::new(error) });
    } else {
        terminal.to_stderr(|out, style| write_error(out, style, error));
    }
}

/// What it is, what was being done, what to do next.
fn write_error(out: &mut dyn Write, style: Style, error: &Error) -> io::Result<()> {
    writeln!(out, "{} {error}", style.bad("error:"))?;
    for context in error.contexts() {
        writeln!(out, "  while {}", clean(context))?;
    }
    match error.hint_text() {
        Some(hint) => writeln!(out, "{} {}", style.good("hint:"), clean(hint)),
        None => Ok(()),
    }
}

#[derive(Serialize)]
struct ErrorReport<'a> {
    error: ErrorBody<'a>,
}

/// An error as scripts see it.
#[derive(Serialize)]
pub struct ErrorBody<'a> {
    code: &'static str,
    kind: &'static str,
    message: &'a str,
    cause: Option<String>,
    image: Option<&'a str>,
    format: Option<&'static str>,
    field: Option<&'a str>,
    offset: Option<u64>,
    found: Option<&'a str>,
    allowed: Option<&'a str>,
    hint: Option<&'a str>,
    context: &'a [String],
}

impl<'a> ErrorBody<'a> {
    /// The parts of `error`.
    pub fn new(error: &'a Error) -> Self {
        ErrorBody {
            code: error.code().as_str(),
            kind: kind_name(error.kind()),
            message: error.message(),
            cause: error.io_error().map(ToString::to_string),
            image: error.image_name(),
            format: error.format_name(),
            field: error.field_name(),
            offset: error.offset(),
            found: error.found_value(),
            allowed: error.allowed_values(),
            hint: error.hint_text(),
            context: error.contexts(),
        }
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Damaged => "damaged",
        Kind::NotImplemented => "not_implemented",
        Kind::NotAllowed => "not_allowed",
        Kind::Misuse => "misuse",
        Kind::NotFound => "not_found",
        Kind::Busy => "busy",
        Kind::Io => "io",
        Kind::Cancelled => "cancelled",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_whose_fault_it_is() {
        let status = |code| ExitStatus::of(&Error::new(code, "")).0;
        assert_eq!(status(Code::Usage), 2);
        assert_eq!(status(Code::Exists), 2);
        assert_eq!(status(Code::NotFound), 3);
        assert_eq!(status(Code::ParentMissing), 3);
        assert_eq!(status(Code::Io), 4);
        assert_eq!(status(Code::NoSpace), 4);
        assert_eq!(status(Code::Permission), 4);
        assert_eq!(status(Code::Corrupt), 5);
        assert_eq!(status(Code::Feature), 5);
        assert_eq!(status(Code::PathEscape), 5);
        assert_eq!(status(Code::Locked), 6);
        assert_eq!(status(Code::Cancelled), 130);
        assert_eq!(ExitStatus::of_signal(15).0, 143);
    }

    #[test]
    fn every_code_has_a_kind_that_scripts_know() {
        for code in Code::ALL {
            assert_ne!(kind_name(code.kind()), "other", "{code:?}");
        }
    }
}
