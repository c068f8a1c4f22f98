//! Standard output and standard error: the report goes to one, notes, warnings and progress to the other.

use crate::args::ColorChoice;
use crate::failure::Failure;
use crate::text::clean;
use indicatif::ProgressBar;
use serde::Serialize;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Where a command shows what it has to say. Cheap to clone.
#[derive(Clone)]
pub struct Terminal {
    json: bool,
    quiet: bool,
    out: Style,
    err: Style,
    /// The bar that is being shown, which must give way to other lines.
    bar: Arc<Mutex<Option<ProgressBar>>>,
}

impl Terminal {
    /// The terminal as the arguments want it.
    pub fn new(json: bool, quiet: bool, color: ColorChoice) -> Self {
        let style = |is_terminal| Style { colored: color.resolve(is_terminal) };
        let (out, err) = (style(io::stdout().is_terminal()), style(io::stderr().is_terminal()));
        Terminal { json, quiet, out, err, bar: Arc::default() }
    }

    /// Whether the report is JSON.
    pub fn wants_json(&self) -> bool {
        self.json
    }

    /// Whether progress and notes are unwanted.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Writes a report for people to standard output.
    pub fn report(&self, write: impl FnOnce(&mut dyn Write, Style) -> io::Result<()>) -> Result<(), Failure> {
        let mut out = BufWriter::new(io::stdout().lock());
        write(&mut out, self.out)?;
        Ok(out.flush()?)
    }

    /// Writes a report for scripts to standard output.
    pub fn json(&self, report: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(report).map_err(io::Error::from)?;
        self.report(|out, _| writeln!(out, "{}", escape_controls(&text)))
    }

    /// Something worth knowing. Not with `--quiet`.
    pub fn note(&self, message: &str) {
        if !self.quiet {
            self.to_stderr(|out, style| writeln!(out, "{} {}", style.key("note:"), clean(message)));
        }
    }

    /// Something odd that was tolerated.
    pub fn warn(&self, message: &str) {
        self.to_stderr(|out, style| writeln!(out, "{} {}", style.warning("warning:"), clean(message)));
    }

    /// Writes to standard error, above a progress bar if one is shown. A closed standard error is nobody's fault.
    pub fn to_stderr(&self, write: impl FnOnce(&mut dyn Write, Style) -> io::Result<()>) {
        let mut lines = Vec::new();
        let _ = write(&mut lines, self.err);
        let show = || {
            let _ = io::stderr().lock().write_all(&lines);
        };
        match &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(bar) => bar.suspend(show),
            None => show(),
        }
    }

    /// Shows `bar`, or none.
    pub fn set_bar(&self, bar: Option<ProgressBar>) {
        *self.bar.lock().unwrap_or_else(PoisonError::into_inner) = bar;
    }

    /// Whether a bar can be shown.
    pub fn can_show_bar(&self) -> bool {
        !self.quiet && io::stderr().is_terminal() && !is_dumb()
    }
}

/// JSON allows most control characters to stand as they are; a terminal would obey them.
pub fn escape_controls(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_control() && c != '\n' {
            safe.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            safe.push(c);
        }
    }
    safe
}

/// Colours, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    colored: bool,
}

impl Style {
    /// A heading.
    pub fn title(self, text: &str) -> String {
        self.paint("1", text)
    }
    /// The name of something.
    pub fn key(self, text: &str) -> String {
        self.paint("36", text)
    }
    /// What matters less.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }
    /// Success, or the way to it.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
    /// What is odd.
    pub fn warning(self, text: &str) -> String {
        self.paint("1;33", text)
    }
    /// What went wrong.
    pub fn bad(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colored { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

impl ColorChoice {
    fn resolve(self, is_terminal: bool) -> bool {
        match self {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // https://no-color.org: set and not empty.
            ColorChoice::Auto => {
                is_terminal && !is_dumb() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        }
    }
}

fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}
