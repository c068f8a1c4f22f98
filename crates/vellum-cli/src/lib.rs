//! The `vellum` command: one file per verb, over the library `vellum`, which does the work.
//!
//! ```text
//!   info create convert compare map digest formats     the verbs: arguments, and how a result is shown
//!   check repair snapshot io bench channel
//!   args        arguments that several verbs share, and their parsers
//!   writing     how disks are written, and asking before something is lost
//!   terminal    standard output and error: colours, notes, warnings, JSON
//!   meter       progress of long jobs, and stopping them by a signal
//!   trace       warnings of the libraries that reach nobody else
//!   failure     how an error is shown, and the exit codes
//!   text        sizes and durations for people; text from images made safe for a terminal
//! ```

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod args;
mod bench;
mod channel;
mod check;
mod compare;
mod convert;
mod create;
mod digest;
mod failure;
mod formats;
mod info;
mod io;
mod map;
mod meter;
mod repair;
mod snapshot;
mod terminal;
mod text;
mod trace;
mod writing;

use args::ColorChoice;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use failure::{ExitStatus, Failure};
use std::ffi::OsString;
use std::process::ExitCode;
use terminal::Terminal;

/// The text below `vellum --help`.
const AFTER_HELP: &str = "\
Exit codes:
  0    done; for compare: the disks are the same; for check: nothing is wrong
  1    compare: the disks differ; io: what was read is not what was expected
  2    the command line is wrong, or the target exists (--force overwrites it)
  3    a file, a parent or an extent was not found
  4    the machine failed: I/O error, no space, no permission
  5    an image is damaged (repair: still), or was refused by a limit or a policy
  6    another process uses the image
  130  stopped by Ctrl-C (143: by SIGTERM); convert says whether --resume goes on

check alone has those of `qemu-img check`: 0 nothing is wrong, 1 could not be checked, 2 errors, 3 only leaks

Examples:
  vellum info disk.vmdk
  vellum convert -O qcow2 --compress disk.vmdk disk.qcow2
  vellum compare disk.vmdk disk.qcow2";

/// Opens, writes, converts, compares, checks and repairs virtual disks: qcow2, vmdk, vdi, vhd, raw.
#[derive(Parser)]
#[command(name = "vellum", version, propagate_version = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    verb: Verb,
}

/// Arguments that every verb takes.
#[derive(clap::Args, Clone, Copy)]
struct GlobalArgs {
    /// Report as JSON on standard output; errors too
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
    /// Neither progress nor notes; warnings and errors remain
    #[arg(short, long, global = true, help_heading = "Everywhere")]
    quiet: bool,
    /// When to use colours; auto is on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value_t = ColorChoice::Auto, value_name = "WHEN", help_heading = "Everywhere")]
    color: ColorChoice,
}

#[derive(Subcommand)]
enum Verb {
    Info(info::InfoArgs),
    Create(create::CreateArgs),
    Convert(convert::ConvertArgs),
    Compare(compare::CompareArgs),
    Map(map::MapArgs),
    Digest(digest::DigestArgs),
    Check(check::CheckArgs),
    Repair(repair::RepairArgs),
    Snapshot(snapshot::SnapshotArgs),
    Io(io::IoArgs),
    Bench(bench::BenchArgs),
    Channel(channel::ChannelArgs),
    Formats(formats::FormatsArgs),
}

/// The definition of the command line, for man pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let color = color_in(&words);
    let parsed = Cli::command().color(color.into()).try_get_matches_from(&words);
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &words, color),
    };
    let terminal = Terminal::new(cli.global.json, cli.global.quiet, cli.global.color);
    trace::show_warnings(&terminal);
    let is_check = matches!(cli.verb, Verb::Check(_));
    let status = match run(cli.verb, &terminal) {
        Ok(status) => status,
        Err(failure) if is_check => failure.show(&terminal).of_failed_check(),
        Err(failure) => failure.show(&terminal),
    };
    status.into()
}

fn run(verb: Verb, terminal: &Terminal) -> Result<ExitStatus, Failure> {
    let done = |()| ExitStatus::DONE;
    match verb {
        Verb::Info(args) => info::run(&args, terminal).map(done),
        Verb::Create(args) => create::run(&args, terminal).map(done),
        Verb::Convert(args) => convert::run(&args, terminal).map(done),
        Verb::Compare(args) => compare::run(&args, terminal),
        Verb::Map(args) => map::run(&args, terminal).map(done),
        Verb::Digest(args) => digest::run(&args, terminal).map(done),
        Verb::Check(args) => check::run(&args, terminal),
        Verb::Repair(args) => repair::run(&args, terminal),
        Verb::Snapshot(args) => snapshot::run(&args, terminal).map(done),
        Verb::Io(args) => io::run(&args, terminal),
        Verb::Bench(args) => bench::run(&args, terminal).map(done),
        Verb::Channel(args) => channel::run(&args, terminal).map(done),
        Verb::Formats(args) => formats::run(&args, terminal).map(done),
    }
}

/// Help, version, or a command line that is wrong.
fn refuse(error: &clap::Error, words: &[OsString], color: ColorChoice) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Err(cause) => Failure::from(cause).show(&Terminal::new(false, true, color)).into(),
            Ok(()) => ExitStatus::DONE.into(),
        };
    }
    // The first word that is no option: none of the options before a verb takes a value that could be `check`.
    let verb = options(words).find(|word| !word.starts_with('-'));
    let status = match verb {
        Some("check") => ExitStatus::USAGE.of_failed_check(),
        _ => ExitStatus::USAGE,
    };
    if options(words).any(|word| word == "--json") {
        let terminal = Terminal::new(true, true, color);
        Failure::from(usage_error(error)).show(&terminal);
    } else {
        // Nobody is left to tell if standard error is closed.
        let _ = error.print();
    }
    status.into()
}

/// The parser's message as an error of Vellum: its first paragraph, without the word `error` and the usage.
fn usage_error(error: &clap::Error) -> vellum::Error {
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or(&text);
    let words: Vec<&str> = first.split_whitespace().collect();
    let message = words.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    vellum::Error::new(vellum::Code::Usage, message)
        .hint("`vellum --help` and `vellum VERB --help` tell more")
}

/// What is asked for by `--color`, before the command line is known to be right.
fn color_in(words: &[OsString]) -> ColorChoice {
    let mut choice = ColorChoice::Auto;
    let mut words = options(words).peekable();
    while let Some(word) = words.next() {
        let value = match word.strip_prefix("--color") {
            Some("") => words.peek().copied().unwrap_or_default(),
            Some(rest) => rest.strip_prefix('=').unwrap_or_default(),
            None => continue,
        };
        choice = <ColorChoice as clap::ValueEnum>::from_str(value, false).unwrap_or(choice);
    }
    choice
}

/// The words before a `--` that are text.
fn options(words: &[OsString]) -> impl Iterator<Item = &str> {
    words.iter().skip(1).map_while(|word| (word != "--").then_some(word)).filter_map(|word| word.to_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_examples() {
        for verb in Cli::command().get_subcommands() {
            let text = verb.get_after_help().map(|help| help.to_string()).unwrap_or_default();
            assert!(
                text.contains(&format!("vellum {}", verb.get_name())),
                "{} lacks examples",
                verb.get_name()
            );
        }
    }

    #[test]
    fn the_reference_names_every_verb_argument_and_exit_code() {
        let reference = include_str!("../../../docs/cli.md");
        for verb in Cli::command().get_subcommands() {
            assert!(reference.contains(&format!("## vellum {}", verb.get_name())), "{}", verb.get_name());
            for action in std::iter::once(verb).chain(verb.get_subcommands()) {
                for long in action.get_arguments().filter_map(|argument| argument.get_long()) {
                    assert!(reference.contains(&format!("--{long}")), "--{long} of {}", verb.get_name());
                }
            }
        }
        let codes = AFTER_HELP.lines().skip(1).take_while(|line| !line.is_empty());
        for code in codes.filter_map(|line| line.split_whitespace().next()) {
            assert!(reference.contains(&format!("| {code} |")), "exit code {code}");
        }
    }

    #[test]
    fn color_is_found_before_the_rest_is_understood() {
        let find = |words: &[&str]| {
            let words: Vec<OsString> =
                std::iter::once("vellum").chain(words.iter().copied()).map(Into::into).collect();
            color_in(&words)
        };
        assert_eq!(find(&["--color", "never", "?"]), ColorChoice::Never);
        assert_eq!(find(&["x", "--color=always"]), ColorChoice::Always);
        assert_eq!(find(&["--", "--color=always"]), ColorChoice::Auto);
        assert_eq!(find(&["--color"]), ColorChoice::Auto);
    }
}
