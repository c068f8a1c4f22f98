//! `cargo xtask bench`: Vellum beside `qemu-img`, in the same run on the same machine. `benches/README.md` explains
//! what is measured, `docs/benchmarks.md` holds the results.

mod channel;
mod convert;
mod disk;
mod empty;
mod host;
mod io;
mod measure;
mod options;
mod pair;
mod reflink;
mod report;
mod resume;
mod tools;
mod variant;

/// What went wrong, as a sentence for the person at the terminal.
type Result<T> = std::result::Result<T, String>;

/// Runs `cargo xtask bench ARGUMENTS`.
pub fn run(arguments: &[String]) -> Result<()> {
    let Some((part, rest)) = arguments.split_first() else { return Err(options::USAGE.to_owned()) };
    if [part.as_str()]
        .iter()
        .chain(&rest.iter().map(String::as_str).collect::<Vec<_>>())
        .any(|word| is_help(word))
    {
        println!("{}", options::USAGE);
        return Ok(());
    }
    let options = options::Options::parse(rest)?;
    measure::catch_interrupts();
    match part.as_str() {
        "convert" => convert::run(&options),
        "reflink" => reflink::run(&options),
        "empty" => empty::run(&options),
        "io" => io::run(&options),
        "channel" => channel::run(&options),
        "disk" => disk::Disk::ready(&options.directory_or(&tools::default_directory()), options.used_bytes)
            .map(|disk| println!("{}: {} MiB used", disk.raw().display(), disk.used_bytes >> 20)),
        other => Err(format!("there is no benchmark {other:?}\n\n{}", options::USAGE)),
    }
}

fn is_help(word: &str) -> bool {
    matches!(word, "-h" | "--help" | "help")
}
