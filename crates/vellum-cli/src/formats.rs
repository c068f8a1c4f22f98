//! `vellum formats`: the formats, and the options that each takes when an image is made.

use crate::failure::Failure;
use crate::terminal::{Style, Terminal};
use crate::text::size;
use clap::Args;
use serde::Serialize;
use std::io::{self, Write};
use std::sync::Arc;
use vellum::{Format, FormatRegistry, OptionKind, OptionSpec};

const AFTER_HELP: &str = "\
Examples:
  vellum formats
  vellum formats vmdk
  vellum formats --json";

/// List the formats, or the options of one
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct FormatsArgs {
    /// Show the options that this format takes with -o
    format: Option<String>,
}

#[derive(Serialize)]
struct Report {
    formats: Vec<FormatReport>,
}

#[derive(Serialize)]
struct FormatReport {
    name: &'static str,
    aliases: &'static [&'static str],
    description: &'static str,
    extensions: &'static [&'static str],
    create_options: Vec<OptionReport>,
}

#[derive(Serialize)]
struct OptionReport {
    name: &'static str,
    r#type: &'static str,
    default: &'static str,
    values: Option<&'static [&'static str]>,
    min: Option<u64>,
    max: Option<u64>,
    expert: bool,
    help: &'static str,
}

/// Runs the verb.
pub fn run(args: &FormatsArgs, terminal: &Terminal) -> Result<(), Failure> {
    let registry = FormatRegistry::new(vellum::formats());
    let one = args.format.as_deref().map(|name| registry.by_name(name)).transpose()?;
    if terminal.wants_json() {
        return match &one {
            Some(format) => terminal.json(&describe(format.as_ref())),
            None => {
                let formats = registry.all().iter().map(|format| describe(format.as_ref())).collect();
                terminal.json(&Report { formats })
            }
        };
    }
    match &one {
        Some(format) => terminal.report(|out, style| write_one(out, style, format.as_ref())),
        None => terminal.report(|out, style| write_table(out, style, registry.all())),
    }
}

fn describe(format: &dyn Format) -> FormatReport {
    FormatReport {
        name: format.name(),
        aliases: format.aliases(),
        description: format.description(),
        extensions: format.extensions(),
        create_options: format.create_options().iter().map(describe_option).collect(),
    }
}

fn describe_option(spec: &OptionSpec) -> OptionReport {
    let (r#type, values, range) = match spec.kind {
        OptionKind::Text => ("text", None, None),
        OptionKind::Flag => ("flag", Some(["on", "off"].as_slice()), None),
        OptionKind::Number { min, max } => ("number", None, Some((min, max))),
        OptionKind::Size { min, max } => ("size", None, Some((min, max))),
        OptionKind::OneOf(words) => ("one_of", Some(words), None),
    };
    OptionReport {
        name: spec.name,
        r#type,
        default: spec.default,
        values,
        min: range.map(|(min, _)| min),
        max: range.map(|(_, max)| max),
        expert: spec.expert,
        help: spec.help,
    }
}

fn write_table(out: &mut dyn Write, style: Style, formats: &[Arc<dyn Format>]) -> io::Result<()> {
    for format in formats {
        writeln!(out, "{}{}", style.title(&format!("{:8}", format.name())), format.description())?;
        let mut names = Vec::new();
        if !format.aliases().is_empty() {
            names.push(format!("also called {}", format.aliases().join(", ")));
        }
        if !format.extensions().is_empty() {
            let extensions: Vec<String> = format.extensions().iter().map(|e| format!(".{e}")).collect();
            names.push(extensions.join(" "));
        }
        if !names.is_empty() {
            writeln!(out, "{:8}{}", "", style.dim(&names.join("; ")))?;
        }
    }
    writeln!(out, "\n`vellum formats FORMAT` lists the options of a format.")
}

fn write_one(out: &mut dyn Write, style: Style, format: &dyn Format) -> io::Result<()> {
    write_table_head(out, style, format)?;
    if format.create_options().is_empty() {
        return writeln!(out, "\nIt takes no options.");
    }
    for (title, expert) in [("Options for -o", false), ("For those who know the format", true)] {
        let mut specs = format.create_options().iter().filter(|spec| spec.expert == expert).peekable();
        if specs.peek().is_none() {
            continue;
        }
        writeln!(out, "\n{}:", style.title(title))?;
        for spec in specs {
            writeln!(out, "  {}={}", style.key(spec.name), values(spec.kind))?;
            writeln!(out, "      {}{}", spec.help, default(spec.default))?;
        }
    }
    Ok(())
}

fn write_table_head(out: &mut dyn Write, style: Style, format: &dyn Format) -> io::Result<()> {
    write!(out, "{}: {}", style.title(format.name()), format.description())?;
    match format.aliases() {
        [] => writeln!(out),
        aliases => writeln!(out, " (also called {})", aliases.join(", ")),
    }
}

fn default(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" [{text}]") }
}

fn values(kind: OptionKind) -> String {
    match kind {
        OptionKind::Text => "TEXT".to_owned(),
        OptionKind::Flag => "on|off".to_owned(),
        OptionKind::Number { min, max: u64::MAX } => format!("NUMBER, {min} or more"),
        OptionKind::Number { min, max } => format!("NUMBER, {min} to {max}"),
        OptionKind::Size { min, max: u64::MAX } => format!("SIZE, {} or more", size(min)),
        OptionKind::Size { min, max } => format!("SIZE, {} to {}", size(min), size(max)),
        OptionKind::OneOf(words) => words.join("|"),
    }
}
