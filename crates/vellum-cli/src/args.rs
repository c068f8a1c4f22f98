//! Arguments that several verbs share, and their parsers.

use crate::terminal::Terminal;
use clap::{Args, ValueEnum};
use vellum::io::{Driver, FilePolicy, LocalFiles, LockMode, OpenOptions};
use vellum::{ChainOptions, Code, Error, Events, Location, OpenedImage, Result, Vellum, parse_size};

/// When to use colours. `Auto`: on a terminal, unless NO_COLOR is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    // No doc comments here: the help stays short.
    Auto,
    Always,
    Never,
}

impl From<ColorChoice> for clap::ColorChoice {
    fn from(choice: ColorChoice) -> Self {
        match choice {
            ColorChoice::Auto => clap::ColorChoice::Auto,
            ColorChoice::Always => clap::ColorChoice::Always,
            ColorChoice::Never => clap::ColorChoice::Never,
        }
    }
}

/// How the files of images are reached.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Opening")]
pub struct FileArgs {
    /// Directory whose files images may name as parents and extents, besides their own directory; may be repeated
    #[arg(long = "allow-dir", value_name = "DIR")]
    pub allow_dirs: Vec<String>,
    /// Go around the host's page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,
    /// Read although another process may be writing: what is read may be inconsistent
    #[arg(short = 'U', long, conflicts_with = "no_lock")]
    pub shared_read: bool,
    /// Neither take locks nor look at those of others: two writers destroy an image
    #[arg(long)]
    pub no_lock: bool,
}

impl FileArgs {
    /// The library over the files of this machine. The jobs of the command bring their own threads and wait for each
    /// request: a hop to another thread gains nothing.
    pub fn vellum(&self) -> Vellum {
        self.vellum_with(Driver::Inline)
    }

    /// The library over the files of this machine, with `driver`.
    pub fn vellum_with(&self, driver: Driver) -> Vellum {
        let policy = FilePolicy {
            allowed_directories: self.allow_dirs.iter().map(Into::into).collect(),
            ..FilePolicy::default()
        };
        let lock = match (self.no_lock, self.shared_read) {
            (true, _) => LockMode::None,
            (false, true) => LockMode::SharedRead,
            (false, false) => LockMode::Normal,
        };
        let open = OpenOptions { direct: self.direct, driver, lock, ..OpenOptions::default() };
        Vellum::new(std::sync::Arc::new(LocalFiles::new(policy, open)))
    }

    /// How an image whose format is `format` is opened, where its parents do not matter.
    pub fn options(&self, format: Option<&str>, terminal: &Terminal) -> ChainOptions {
        let terminal = terminal.clone();
        ChainOptions {
            format: format.map(str::to_owned),
            events: Events::new(move |message| terminal.warn(message)),
            ..ChainOptions::default()
        }
    }
}

/// How images and what they refer to are opened.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Opening")]
pub struct OpenArgs {
    /// Place of a parent; repeat for the parent's parent, nearest first
    #[arg(long = "parent", value_name = "FILE")]
    pub parents: Vec<String>,
    /// Recognise by content the format of a parent that its child does not state
    #[arg(long)]
    pub probe_parents: bool,
    /// Use a parent although it was modified after the child was made
    #[arg(long)]
    pub allow_modified_parent: bool,
    /// Read what the disk was in this internal snapshot (id or name)
    #[arg(long, value_name = "ID")]
    pub snapshot: Option<String>,
    #[command(flatten)]
    pub files: FileArgs,
}

impl OpenArgs {
    /// The library over the files of this machine.
    pub fn vellum(&self) -> Vellum {
        self.files.vellum()
    }

    /// How a chain whose top image has `format` is opened; warnings go to the terminal.
    pub fn chain(&self, format: Option<&str>, terminal: &Terminal) -> ChainOptions {
        ChainOptions {
            parents: self.parents.iter().map(|place| Location(place.clone())).collect(),
            probe_parents: self.probe_parents,
            allow_modified_parent: self.allow_modified_parent,
            snapshot: self.snapshot.clone(),
            ..self.files.options(format, terminal)
        }
    }
}

/// Notes the images that are read as raw because no format claims them.
pub fn note_raw(images: &[OpenedImage], terminal: &Terminal) {
    for image in images.iter().filter(|image| image.raw_by_default) {
        note_read_as_raw(&image.layer.location.0, terminal);
    }
}

/// Notes that no format claims `name`.
pub fn note_read_as_raw(name: &str, terminal: &Terminal) {
    terminal.note(&format!("{name} has the marks of no format and is read as raw; use -f raw to say so"));
}

/// The driver options of `-o`, in the order given: `name=value`, separated by commas; `,,` is a comma in a value.
pub fn driver_options(given: &[String], preallocation: Option<&str>) -> Result<Vec<(String, String)>> {
    let mut options: Vec<(String, String)> = Vec::new();
    for item in given.iter().flat_map(|text| split_at_commas(text)) {
        let Some((name, value)) = item.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(Error::new(Code::Usage, format!("-o {item:?} is not of the form name=value"))
                .hint("`vellum formats FORMAT` lists the options of a format"));
        };
        options.push((name.to_owned(), value.to_owned()));
    }
    if let Some(mode) = preallocation {
        let other = options.iter().find(|(name, value)| name == "preallocation" && value != mode);
        if let Some((_, value)) = other {
            let message = format!("--preallocation {mode} contradicts -o preallocation={value}");
            return Err(Error::new(Code::Usage, message).hint("give one of them"));
        }
        options.push(("preallocation".to_owned(), mode.to_owned()));
    }
    Ok(options)
}

fn split_at_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match items.last_mut() {
            Some(last) if c != ',' || rest.next_if_eq(&',').is_some() => last.push(c),
            _ => items.push(String::new()),
        }
    }
    items
}

/// The format of a new image: the one given, else the one that the target's extension means beyond doubt.
pub fn target_format(given: Option<&str>, target: &str, terminal: &Terminal) -> Result<String> {
    if let Some(format) = given {
        return Ok(format.to_owned());
    }
    let extension = std::path::Path::new(target).extension().and_then(|text| text.to_str());
    let format = match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("qcow2") => "qcow2",
        Some("vmdk") => "vmdk",
        Some("vdi") => "vdi",
        Some("vhd" | "vpc") => "vhd",
        Some("raw" | "img") => "raw",
        _ => {
            return Err(Error::new(
                Code::Usage,
                "the name does not tell which format the new image is to have",
            )
            .image(target)
            .hint("say it with -O FORMAT; `vellum formats` lists the formats"));
        }
    };
    terminal.note(&format!("writing {format}, after the name of the target; use -O {format} to say so"));
    Ok(format.to_owned())
}

/// Parses a size such as `10G`.
pub fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| {
        let advice =
            "write a whole number, with one of the binary suffixes K M G T P E if you like, such as 10G";
        if text.contains(['.', ',']) { format!("{advice}, and 1536G for 1.5T") } else { advice.to_owned() }
    })
}

/// Parses the size of the smallest run of zeros that becomes a hole.
pub fn sparse_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        bytes if bytes.is_multiple_of(512) => Ok(bytes),
        _ => Err("write 0 or a multiple of 512 bytes".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(given: &[&str], preallocation: Option<&str>) -> Result<Vec<(String, String)>> {
        let given: Vec<String> = given.iter().map(|text| text.to_string()).collect();
        driver_options(&given, preallocation)
    }

    #[test]
    fn driver_options_repeat_split_and_escape() {
        let list = pairs(&["a=b,c=d", "e=f,,g=h"], Some("full")).unwrap();
        let list: Vec<(&str, &str)> = list.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(list, [("a", "b"), ("c", "d"), ("e", "f,g=h"), ("preallocation", "full")]);
        assert_eq!(pairs(&["a="], None).unwrap(), [("a".to_owned(), String::new())]);
    }

    #[test]
    fn malformed_and_contradicting_options_are_refused_by_name() {
        for bad in ["compat6", "", "a=b,", "=x", ","] {
            assert_eq!(pairs(&[bad], None).unwrap_err().code(), Code::Usage, "{bad:?}");
        }
        let both = pairs(&["preallocation=off"], Some("full")).unwrap_err().to_string();
        assert!(both.contains("preallocation=off") && both.contains("full"), "{both}");
        assert!(pairs(&["preallocation=full"], Some("full")).is_ok());
    }

    #[test]
    fn the_extension_is_used_only_where_it_is_unambiguous() {
        let terminal = Terminal::new(false, true, ColorChoice::Never);
        let format = |given, target| target_format(given, target, &terminal);
        assert_eq!(format(None, "a/b.QCOW2").unwrap(), "qcow2");
        assert_eq!(format(None, "b.vpc").unwrap(), "vhd");
        assert_eq!(format(None, "b.img").unwrap(), "raw");
        assert_eq!(format(Some("vdi"), "b.img").unwrap(), "vdi");
        for unclear in ["b", "b.bin", "b.qcow", "/dev/sda", ".vmdk", "b.qcow2/"] {
            let found = format(None, unclear);
            assert!(unclear == "b.qcow2/" || found.is_err(), "{unclear}");
        }
    }

    #[test]
    fn sizes_are_whole_and_sparse_sizes_are_sectors() {
        assert_eq!(size("10G"), Ok(10 << 30));
        assert!(size("1.5T").unwrap_err().contains("1536G"));
        assert!(size("").is_err() && size("-1").is_err() && size("99999999999999999999").is_err());
        assert_eq!(sparse_size("64k"), Ok(65536));
        assert_eq!(sparse_size("0"), Ok(0));
        assert!(sparse_size("100").is_err());
    }
}
