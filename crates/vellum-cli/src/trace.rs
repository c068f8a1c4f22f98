//! Warnings that the libraries hand to `tracing` because no caller's sink is at hand, such as a file system that does
//! not do direct I/O: shown once each.

use crate::terminal::Terminal;
use std::collections::HashSet;
use std::fmt::{self, Write};
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Different warnings that are remembered; later ones are shown however often they come.
const REMEMBERED: usize = 1000;

/// From here on warnings are shown on `terminal`.
pub fn show_warnings(terminal: &Terminal) {
    let warnings = Warnings { terminal: terminal.clone(), shown: Mutex::default() };
    // Somebody else listens already: then the warnings are theirs.
    let _ = tracing::subscriber::set_global_default(warnings);
}

const LISTENER: &str = "vellum_channel::listener";

struct Warnings {
    terminal: Terminal,
    shown: Mutex<HashSet<String>>,
}

impl Warnings {
    fn is_new(&self, text: &str) -> bool {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.len() >= REMEMBERED {
            return !shown.contains(text);
        }
        shown.insert(text.to_owned())
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // To a library that listens, a client that is turned away is news; to who runs `vellum channel`, a warning.
        let is_turned_away = *metadata.level() <= Level::INFO && metadata.target().starts_with(LISTENER);
        metadata.is_event() && (*metadata.level() <= Level::WARN || is_turned_away)
    }
    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = line.message + &line.fields;
        if self.is_new(&text) {
            self.terminal.warn(&text);
        }
    }
    // Spans are never enabled.
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

/// The text of an event: its message, then `name=value` of its fields.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
