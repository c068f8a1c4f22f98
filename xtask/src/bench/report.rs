//! Tables for people, samples for programs.

use super::Result;
use super::convert::judge;
use super::options::Options;
use super::pair::{Entry, Pair};
use super::variant::{ALL, MATRIX};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The results of one run, written after every pair, so that an interrupted run keeps what it has.
pub struct Report {
    part: String,
    runs: usize,
    facts: Vec<(&'static str, String)>,
    pairs: Vec<Pair>,
    json: Option<PathBuf>,
    markdown: Option<PathBuf>,
}

impl Report {
    pub fn new(
        part: &str,
        options: &Options,
        mut facts: Vec<(&'static str, String)>,
        used_bytes: u64,
    ) -> Self {
        facts.push(("disk", format!("8 GiB, {} MiB of it used", used_bytes >> 20)));
        facts.push(("rounds", format!("{}, interleaved; medians", options.runs)));
        if !options.vellum_arguments.is_empty() {
            facts.push(("vellum arguments", options.vellum_arguments.join(" ")));
        }
        Report {
            part: part.to_owned(),
            runs: options.runs,
            facts,
            pairs: Vec::new(),
            json: options.json.clone(),
            markdown: options.markdown.clone(),
        }
    }

    /// Takes the pairs over that an interrupted run measured.
    pub fn resumed(&mut self, known: Vec<Pair>) {
        if !known.is_empty() {
            self.facts
                .push(("resumed", format!("{} pairs are from an earlier part of the run", known.len())));
            self.pairs = known;
        }
    }

    /// Adds a pair and brings the files up to date.
    pub fn add(&mut self, pair: Pair) -> Result<()> {
        self.pairs.push(pair);
        if let Some(path) = &self.json {
            write(path, &self.json())?;
        }
        if let Some(path) = &self.markdown {
            write_section(path, &self.part, &self.markdown())?;
        }
        Ok(())
    }

    /// Prints the tables. A wrong or refused conversion is an error.
    pub fn finish(self) -> Result<()> {
        println!("{}", self.markdown());
        judge(&self.pairs)
    }

    fn markdown(&self) -> String {
        let mut text = facts(&self.facts);
        if self.part == "convert" {
            text.push_str(&matrix(&self.pairs));
        }
        text.push_str(&details(&self.pairs, self.part != "convert"));
        text.push_str(&summary(&self.pairs));
        text
    }

    fn json(&self) -> String {
        let facts: Vec<_> =
            self.facts.iter().map(|(name, value)| format!("{}: {}", quoted(name), quoted(value))).collect();
        let pairs: Vec<_> = self.pairs.iter().map(json_of).collect();
        format!(
            "{{\n\"part\": {}, \"runs\": {},\n\"facts\": {{{}}},\n\"pairs\": [\n{}\n]\n}}\n",
            quoted(&self.part),
            self.runs,
            facts.join(", "),
            pairs.join(",\n")
        )
    }
}

/// A table of facts.
pub fn facts(facts: &[(&str, String)]) -> String {
    let mut text = String::from("| | |\n|---|---|\n");
    for (name, value) in facts {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text.push('\n');
    text
}

/// One line for the terminal.
pub fn line(pair: &Pair) -> String {
    let times: Vec<_> = pair
        .entries
        .iter()
        .map(|entry| match (&entry.samples, entry.durable_seconds()) {
            (Err(text), _) => format!("{} failed: {text}", entry.contender.name()),
            (_, seconds) => format!("{} {} s", entry.contender.name(), number(seconds)),
        })
        .collect();
    let wrong = match &pair.verified {
        Some(Err(text)) => format!("  WRONG: {text}"),
        _ => String::new(),
    };
    let name = format!("{} -> {}", pair.source.name, pair.target.name);
    format!("{name:24} ratio {:5}  {}{wrong}", number(pair.ratio()), times.join(", "))
}

/// Ratios alone, sources down, targets across.
fn matrix(pairs: &[Pair]) -> String {
    let names: Vec<_> = ALL[..MATRIX].iter().map(|variant| variant.name).collect();
    let mut text = format!("| from \\ to | {} |\n|---|{}\n", names.join(" | "), "--:|".repeat(names.len()));
    for from in &names {
        let cell = |to: &&str| {
            let pair = pairs.iter().find(|pair| pair.source.name == *from && pair.target.name == *to);
            pair.map_or(String::new(), |pair| number(pair.ratio()))
        };
        let cells: Vec<_> = names.iter().map(cell).collect();
        let _ = writeln!(text, "| {from} | {} |", cells.join(" | "));
    }
    text.push('\n');
    text
}

fn details(pairs: &[Pair], with_taken: bool) -> String {
    let Some(first) = pairs.first() else { return String::new() };
    let names: Vec<_> = first.entries.iter().map(|entry| entry.contender.name()).collect();
    let each = |what: &str| names.iter().map(|name| format!("{name} {what}")).collect::<Vec<_>>().join(" | ");
    let mut head = format!("| pair | {} | ratio | {} | ratio to that |", each("s"), undurable_names(&names));
    let _ = write!(head, " {} | {} |", each("MiB RAM"), each("MiB file"));
    if with_taken {
        let _ = write!(head, " {} |", each("MiB new"));
    }
    let columns = head.matches('|').count() - 1;
    let mut text = format!("{head}\n|---|{}\n", "--:|".repeat(columns - 1));
    for pair in pairs {
        text.push_str(&detail(pair, with_taken));
    }
    text.push('\n');
    text
}

fn undurable_names(names: &[String]) -> String {
    names.iter().skip(1).map(|name| format!("{name} not flushed s")).collect::<Vec<_>>().join(" | ")
}

fn detail(pair: &Pair, with_taken: bool) -> String {
    let cells = |value: &dyn Fn(&Entry) -> String, skip| {
        pair.entries.iter().skip(skip).map(value).collect::<Vec<_>>().join(" | ")
    };
    let mib = |bytes: u64| (bytes.div_ceil(1 << 20)).to_string();
    let seconds = |entry: &Entry| match &entry.samples {
        Ok(_) => number(entry.durable_seconds()),
        Err(_) => "refused".to_owned(),
    };
    let mut text = format!(
        "| {} → {}{} | {} | **{}** | {} | {} | {} | {} |",
        pair.source.name,
        pair.target.name,
        if pair.is_good() { "" } else { " WRONG" },
        cells(&seconds, 0),
        number(pair.ratio()),
        cells(&|entry| number(entry.exit_seconds()), 1),
        number(pair.ratio_to_undurable()),
        cells(&|entry| entry.peak_bytes().map_or("-".to_owned(), mib), 0),
        cells(&|entry| mib(entry.allocated_bytes), 0),
    );
    if with_taken {
        let _ = write!(text, " {} |", cells(&|entry| mib(entry.taken_bytes()), 0));
    }
    text.push('\n');
    text
}

/// What the tables amount to, and what was refused.
fn summary(pairs: &[Pair]) -> String {
    let ratios: Vec<f64> = pairs.iter().filter_map(Pair::ratio).collect();
    let undurable: Vec<f64> = pairs.iter().filter_map(Pair::ratio_to_undurable).collect();
    let mut text = String::new();
    if !ratios.is_empty() {
        let worst =
            pairs.iter().filter_map(|pair| Some((pair.ratio()?, pair))).max_by(|a, b| a.0.total_cmp(&b.0));
        let worst = worst.map_or(String::new(), |(ratio, pair)| {
            format!("{ratio:.2} ({} → {})", pair.source.name, pair.target.name)
        });
        let slower = ratios.iter().filter(|ratio| **ratio > 1.0).count();
        let _ = writeln!(
            text,
            "{} pairs, geometric mean of the ratios {:.2}, worst {worst}, {slower} above 1. Beside qemu-img without a \
             flush: mean {:.2}, {} above 1. Spread of a contender's rounds (slowest less fastest, by the median): \
             {:.0} % in the middle of all.",
            ratios.len(),
            mean(&ratios),
            mean(&undurable),
            undurable.iter().filter(|ratio| **ratio > 1.0).count(),
            spread(pairs) * 100.0
        );
    }
    let verified = pairs.iter().filter(|pair| matches!(pair.verified, Some(Ok(())))).count();
    let _ = writeln!(
        text,
        "\n`qemu-img compare` found the output of {verified} of {} pairs identical.",
        pairs.len()
    );
    for pair in pairs {
        let name = format!("{} → {}", pair.source.name, pair.target.name);
        if let Some(Err(difference)) = &pair.verified {
            let _ = writeln!(text, "\n{name}: WRONG OUTPUT: {difference}");
        }
        for entry in &pair.entries {
            if let Err(reason) = &entry.samples {
                let _ = writeln!(text, "\n{name}: {} has no time: {reason}", entry.contender.name());
            }
        }
    }
    text
}

fn mean(ratios: &[f64]) -> f64 {
    (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len().max(1) as f64).exp()
}

fn spread(pairs: &[Pair]) -> f64 {
    let of_entry = |entry: &Entry| -> Option<f64> {
        let seconds = || entry.samples.iter().flatten().map(|sample| sample.durable_seconds);
        let (fastest, slowest) = (seconds().min_by(f64::total_cmp)?, seconds().max_by(f64::total_cmp)?);
        Some((slowest - fastest) / entry.durable_seconds()?)
    };
    super::measure::median(pairs.iter().flat_map(|pair| &pair.entries).filter_map(of_entry))
}

/// A number with about three digits, or a dash.
pub fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) if value >= 0.1 => format!("{value:.2}"),
        Some(value) if value >= 0.001 => format!("{value:.3}"),
        Some(_) => "< 0.001".to_owned(),
    }
}

fn json_of(pair: &Pair) -> String {
    let entries: Vec<_> = pair.entries.iter().map(json_of_entry).collect();
    let verified = match &pair.verified {
        None => "null".to_owned(),
        Some(Ok(())) => "true".to_owned(),
        Some(Err(text)) => quoted(text),
    };
    format!(
        "{{\"source\": {}, \"target\": {}, \"ratio\": {}, \"ratio_to_undurable\": {}, \"verified\": {verified}, \"entries\": [\n{}]}}",
        quoted(pair.source.name),
        quoted(pair.target.name),
        json_number(pair.ratio()),
        json_number(pair.ratio_to_undurable()),
        entries.join(",\n")
    )
}

fn json_of_entry(entry: &Entry) -> String {
    let samples = |value: &dyn Fn(&super::measure::Sample) -> String| {
        entry.samples.iter().flatten().map(value).collect::<Vec<_>>().join(", ")
    };
    format!(
        "  {{\"contender\": {}, \"refused\": {}, \"durable_seconds\": [{}], \"exit_seconds\": [{}], \"cpu_seconds\": [{}], \
         \"peak_bytes\": [{}], \"allocated_bytes\": {}, \"file_bytes\": {}, \"taken_bytes\": {}}}",
        quoted(&entry.contender.name()),
        entry.samples.as_ref().err().map_or("null".to_owned(), |text| quoted(text)),
        samples(&|sample| format!("{:.4}", sample.durable_seconds)),
        samples(&|sample| format!("{:.4}", sample.exit_seconds)),
        samples(&|sample| format!("{:.4}", sample.cpu_seconds)),
        samples(&|sample| sample.peak_bytes.to_string()),
        entry.allocated_bytes,
        entry.file_bytes,
        entry.taken_bytes(),
    )
}

fn json_number(value: Option<f64>) -> String {
    value.filter(|value| value.is_finite()).map_or("null".to_owned(), |value| format!("{value:.4}"))
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter < ' ' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(letter));
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Replaces what stands between the file's `<!-- begin PART -->` and `<!-- end PART -->`; appends such a section to a
/// file without.
pub fn write_section(path: &Path, part: &str, text: &str) -> Result<()> {
    let old = fs::read_to_string(path).unwrap_or_default();
    write(path, &with_section(&old, part, text))
}

fn with_section(old: &str, part: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- begin {part} -->"), format!("<!-- end {part} -->"));
    match (old.find(&begin), old.find(&end)) {
        (Some(from), Some(to)) if from < to => {
            format!("{}{begin}\n\n{}\n\n{}", &old[..from], text.trim_end(), &old[to..])
        }
        _ => format!("{old}{begin}\n\n{}\n\n{end}\n", text.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_section_of_the_part_is_replaced() {
        let old = "a\n<!-- begin convert -->\nold\n<!-- end convert -->\nb\n<!-- begin empty -->\nkept\n<!-- end empty -->\n";
        let new = with_section(old, "convert", "new\n");
        assert_eq!(
            new,
            "a\n<!-- begin convert -->\n\nnew\n\n<!-- end convert -->\nb\n<!-- begin empty -->\nkept\n<!-- end empty -->\n"
        );
        assert_eq!(with_section(&new, "convert", "new\n"), new);
        assert_eq!(
            with_section("kept\n", "convert", "new\n"),
            "kept\n<!-- begin convert -->\n\nnew\n\n<!-- end convert -->\n"
        );
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(number(Some(123.4)), "123");
        assert_eq!(number(Some(12.34)), "12.3");
        assert_eq!(number(Some(0.5)), "0.50");
        assert_eq!(number(Some(0.0123)), "0.012");
        assert_eq!(number(Some(0.0002)), "< 0.001");
        assert_eq!(number(None), "-");
    }

    #[test]
    fn json_strings_are_escaped() {
        assert_eq!(quoted("a\"b\\c\nd"), "\"a\\\"b\\\\c\\u000ad\"");
    }
}
