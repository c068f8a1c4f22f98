//! Chores of the workspace: `cargo xtask TASK`. A dispatcher; each task is a module.

mod bench;
mod pages;

use std::error::Error;
use std::process::ExitCode;

/// A task takes the arguments after its name.
type Task = fn(&[String]) -> Result<(), Box<dyn Error>>;

/// Name, what it does, and the task.
const TASKS: &[(&str, &str, Task)] = &[
    ("man", "[DIRECTORY]  write the man pages (default: target/man)", pages::man),
    (
        "completions",
        "[DIRECTORY]  write the completions of shells (default: target/completions)",
        pages::completions,
    ),
    ("bench", "convert|reflink|empty [OPTION]...  measure beside qemu-img (bench --help)", |arguments| {
        Ok(bench::run(arguments)?)
    }),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (name, rest) =
        arguments.split_first().map_or(("", [].as_slice()), |(name, rest)| (name.as_str(), rest));
    let Some((_, _, task)) = TASKS.iter().find(|(task, ..)| *task == name) else {
        eprintln!("usage: cargo xtask TASK [ARGUMENT]...");
        for (name, help, _) in TASKS {
            eprintln!("  {name} {help}");
        }
        return ExitCode::from(2);
    };
    match task(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {name}: {error}");
            ExitCode::FAILURE
        }
    }
}
