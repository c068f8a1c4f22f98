//! `cargo xtask bench convert`: the matrix.

use super::disk::Disk;
use super::measure::check_interrupt;
use super::options::Options;
use super::pair::{Arena, Contender, Pair};
use super::report::Report;
use super::variant::{ALL, MATRIX, Variant};
use super::{Result, host, tools};

/// Vellum first, then qemu-img as it comes and as its manual recommends for speed.
const CONTENDERS: [Contender; 3] =
    [Contender::Vellum, Contender::Qemu(&[]), Contender::Qemu(&["-m", "16", "-W"])];

pub fn run(options: &Options) -> Result<()> {
    let vellum = tools::vellum(options)?;
    let disk = Disk::ready(&options.directory_or(&tools::default_directory()), options.used_bytes)?;
    let arena = Arena {
        folder: disk.folder().join("run"),
        vellum: &vellum,
        vellum_arguments: &options.vellum_arguments,
        contenders: &CONTENDERS,
        runs: options.runs,
        verify: options.verify,
    };
    let pairs = wanted(options);
    if pairs.is_empty() {
        return Err("no pair fits --pairs".to_owned());
    }
    for source in ALL.iter().filter(|source| pairs.iter().any(|(from, _)| from.name == source.name)) {
        disk.source(source, disk.folder())?;
    }
    arena.warm_up(&ALL[0], &disk.raw())?;

    let mut report = Report::new("convert", options, host::facts(disk.folder(), &vellum), disk.used_bytes);
    let known = match (&options.json, options.resume) {
        (Some(path), true) => super::resume::pairs(path, &CONTENDERS)?,
        (None, true) => return Err("--resume needs the --json file of the interrupted run".to_owned()),
        (_, false) => Vec::new(),
    };
    let is_known = |source: &Variant, target: &Variant| {
        known.iter().any(|pair| pair.source.name == source.name && pair.target.name == target.name)
    };
    let pairs: Vec<_> = pairs.into_iter().filter(|(source, target)| !is_known(source, target)).collect();
    report.resumed(known);
    for (number, (source, target)) in pairs.iter().enumerate() {
        check_interrupt()?;
        let pair = arena.measure(source, target, &disk.source(source, disk.folder())?)?;
        eprintln!("{:2}/{} {}", number + 1, pairs.len(), super::report::line(&pair));
        report.add(pair)?;
    }
    report.finish()
}

fn wanted(options: &Options) -> Vec<(&'static Variant, &'static Variant)> {
    // A pair named in full may use any variant; a star means those of the matrix.
    let all = ALL.iter().flat_map(|source| ALL.iter().map(move |target| (source, target)));
    all.filter(|(source, target)| {
        let in_matrix =
            [source, target].iter().all(|one| ALL[..MATRIX].iter().any(|other| other.name == one.name));
        let in_full = options.pairs.iter().any(|(from, to)| from == source.name && to == target.name);
        in_full || (in_matrix && options.wants(source, target))
    })
    .collect()
}

/// The pairs that went wrong, as one error.
pub fn judge(pairs: &[Pair]) -> Result<()> {
    let bad: Vec<_> = pairs
        .iter()
        .filter(|pair| !pair.is_good())
        .map(|pair| format!("{} -> {}", pair.source.name, pair.target.name))
        .collect();
    if bad.is_empty() { Ok(()) } else { Err(format!("{} pairs went wrong: {}", bad.len(), bad.join(", "))) }
}
