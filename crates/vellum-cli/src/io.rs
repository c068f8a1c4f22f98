//! `vellum io`: reads and writes of a script, with patterns and verification.

mod command;
mod report;
mod session;
mod written;

use crate::args::{OpenArgs, note_raw};
use crate::failure::{ErrorBody, ExitStatus, Failure};
use crate::terminal::Terminal;
use crate::writing::FlagArgs;
use clap::Args;
use command::{COMMANDS, Command, parse};
use report::{Line, Outcome};
use serde_json::{Value, json};
use session::Session;
use std::cell::RefCell;
use std::io::{BufRead, IsTerminal};
use vellum::{ChainOptions, Code, DiskOptions, Error};

const EXAMPLES: &str = "\
Without -c and --script the commands are read from standard input, and asked for if that is a terminal.

Exits with 0 if all went well, with 1 if something was read that was not expected; other codes are errors (see \
`vellum --help`). The first error ends it, unless --keep-going is given.

Examples:
  vellum io disk.qcow2 -c 'write -P 0xab 0 64K' -c flush -c 'read -P 0xab 0 64K'
  vellum io -r disk.vmdk -c 'read -v 0 512'
  vellum io --discard disk.vdi -c 'write -S 1 0 8M' -c 'discard 1M 1M' -c verify -c map
  vellum io --depth 32 --script commands.txt --json disk.vhd";

/// Read and write a disk by a script
#[derive(Args)]
#[command(after_help = format!("{COMMANDS}\n\n{EXAMPLES}"))]
pub struct IoArgs {
    /// The top image of the disk
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// A command; may be repeated
    #[arg(short, long = "command", value_name = "COMMAND")]
    commands: Vec<String>,
    /// A file with commands, one a line; after those of -c
    #[arg(short, long, value_name = "FILE")]
    script: Option<String>,
    /// Open the disk for reading only
    #[arg(short, long)]
    read_only: bool,
    /// Requests in flight at most; 1 waits for each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,
    /// Go on after an error
    #[arg(long)]
    keep_going: bool,
    #[command(flatten)]
    writing: FlagArgs,
    #[command(flatten)]
    open: OpenArgs,
}

/// Runs the verb.
pub fn run(args: &IoArgs, terminal: &Terminal) -> Result<ExitStatus, Failure> {
    let given = given_commands(args)?;
    let depth = usize::from(args.depth);
    let mut files = args.open.files.clone();
    files.direct |= args.writing.is_direct();
    let later = given.iter().any(|(command, _)| command.later) || given.is_empty();
    let vellum = files.vellum_with(args.writing.driver(if later { depth.max(2) } else { depth }));
    let options = ChainOptions {
        disk: DiskOptions { flags: args.writing.flags(), ..DiskOptions::default() },
        skip_consistency_checks: args.writing.skip_checks,
        shareable: args.writing.shareable,
        sequential: args.writing.sequential,
        ..args.open.chain(args.format.as_deref(), terminal)
    };
    let noted = RefCell::new(false);
    let open = || {
        let (disk, images) = match args.read_only {
            true => vellum.open(&args.image, &options),
            false => vellum.open_for_writing(&args.image, &options),
        }?;
        if !noted.replace(true) {
            note_raw(&images, terminal);
        }
        Ok(disk)
    };
    // Otherwise the first one ends the command, and is shown there.
    let shows_failures = args.keep_going || (given.is_empty() && std::io::stdin().is_terminal());
    let seen = RefCell::new(Seen { shows_failures, ..Seen::default() });
    let mut report = |line: Line| seen.borrow_mut().add(line, terminal);
    let mut session = Session::new(&vellum, depth, args.writing.is_writethrough(), open, &mut report)?;
    let size = session.disk()?.size();
    let ran = run_all(args, &mut session, given, &seen);
    let closed = session.close();
    let mut seen = seen.into_inner();
    // What closing says is of no use then.
    ran?;
    if let Err(failure) = closed {
        match failure {
            // The first error is the cause.
            Failure::Error(error) if seen.failed.is_none() => seen.fail(error),
            // But what came after it may have gone well, and be lost now.
            Failure::Error(error) if args.keep_going => terminal.warn(&format!("closing the disk: {error}")),
            Failure::Error(_) => {}
            other => return Err(other),
        }
    }
    if terminal.wants_json() {
        terminal.json(&json!({
            "image": args.image,
            "virtual_size": size,
            "commands": seen.lines,
            "mismatches": seen.mismatches,
            "error": seen.failed.as_ref().map(ErrorBody::new),
        }))?;
    }
    match seen.failed {
        Some(error) if terminal.wants_json() || shows_failures => Err(Failure::Reported(error)),
        Some(error) => Err(error.into()),
        None if seen.mismatches > 0 => Ok(ExitStatus::DIFFERENT),
        None => Ok(ExitStatus::DONE),
    }
}

/// The commands of the command line and of the script, all understood before anything is opened.
fn given_commands(args: &IoArgs) -> Result<Vec<(Command, String)>, Failure> {
    let mut given = Vec::new();
    for text in &args.commands {
        let parsed = parse(text).map_err(|why| wrong(text, &why))?;
        given.extend(parsed.map(|command| (command, text.clone())));
    }
    if let Some(script) = &args.script {
        let text = std::fs::read_to_string(script)
            .map_err(|error| Error::from_io(error, "reading the script").image(script))?;
        for (number, line) in text.lines().enumerate() {
            let parsed = parse(line).map_err(|why| {
                wrong(line, &why).context(format!("reading line {} of {script}", number + 1))
            })?;
            given.extend(parsed.map(|command| (command, line.to_owned())));
        }
    }
    Ok(given)
}

fn wrong(text: &str, why: &str) -> Error {
    Error::new(Code::Usage, format!("{:?}: {why}", text.trim())).hint("`vellum io --help` lists the commands")
}

/// Runs the given commands, or those of standard input. The error is one of the report.
fn run_all(
    args: &IoArgs,
    session: &mut Session<'_>,
    given: Vec<(Command, String)>,
    seen: &RefCell<Seen>,
) -> Result<(), Failure> {
    let stops = || seen.borrow().failed.is_some() && !args.keep_going;
    if !args.commands.is_empty() || args.script.is_some() {
        for (command, text) in given {
            session.run(command, &text)?;
            if stops() {
                break;
            }
        }
        return Ok(());
    }
    let is_terminal = std::io::stdin().is_terminal();
    let prompt = || {
        if is_terminal {
            eprint!("vellum> ");
        }
    };
    prompt();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match parse(&line) {
            Ok(Some(command)) => session.run(command, &line)?,
            Ok(None) => {}
            Err(why) if is_terminal => eprintln!("{why}"),
            Err(why) => {
                seen.borrow_mut().fail(wrong(&line, &why));
            }
        }
        if !is_terminal && stops() {
            break;
        }
        prompt();
    }
    Ok(())
}

/// What came of the commands so far.
#[derive(Default)]
struct Seen {
    shows_failures: bool,
    lines: Vec<Value>,
    mismatches: u64,
    failed: Option<Error>,
}

impl Seen {
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }

    fn add(&mut self, line: Line, terminal: &Terminal) -> std::io::Result<()> {
        self.mismatches += u64::from(line.outcome.differs());
        if terminal.wants_json() {
            self.lines.push(line.json());
        } else if !terminal.is_quiet() || line.matters() {
            let shown = terminal.report(|out, style| match &line.outcome {
                Outcome::Failed(_) if !self.shows_failures => Ok(()),
                _ => line.write(out, style),
            });
            if let Err(Failure::Output(error)) = shown {
                return Err(error);
            }
        }
        if let Outcome::Failed(error) = line.outcome {
            self.fail(error.context(format!("carrying out {:?}", line.text.trim())));
        }
        Ok(())
    }
}
