//! Man pages and completions, from the definition of the command line itself.

use clap::ValueEnum;
use clap_complete::Shell;
use std::error::Error;
use std::path::{Path, PathBuf};

/// Writes a man page for the command and for every verb.
pub fn man(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let directory = directory(arguments, "man")?;
    clap_mangen::generate_to(vellum_cli::command(), &directory)?;
    tell(&directory)
}

/// Writes completions for every shell that clap knows.
pub fn completions(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let directory = directory(arguments, "completions")?;
    for shell in Shell::value_variants() {
        clap_complete::generate_to(*shell, &mut vellum_cli::command(), "vellum", &directory)?;
    }
    tell(&directory)
}

fn directory(arguments: &[String], default: &str) -> Result<PathBuf, Box<dyn Error>> {
    let directory = match arguments {
        [] => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(default),
        [directory] => PathBuf::from(directory),
        _ => return Err("at most one argument, the directory".into()),
    };
    std::fs::create_dir_all(&directory)?;
    Ok(directory.canonicalize()?)
}

fn tell(directory: &Path) -> Result<(), Box<dyn Error>> {
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    println!("{}: {}", directory.display(), names.join(" "));
    Ok(())
}
