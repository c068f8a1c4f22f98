//! What a guest does, and how a replay line writes it.

use std::fmt;
use std::str::FromStr;
use vellum::OpenFlags;
use vellum_sim::Fault;

/// One request of a guest. Offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestOp {
    /// Writes tagged data.
    Write(u64, u64),
    /// Writes tagged data that is durable when it is answered.
    Fua(u64, u64),
    /// Writes zeros as data.
    WriteZeros(u64, u64),
    /// Writes what is there already.
    WriteSame(u64, u64),
    /// Zeroes; the space may go.
    Zero(u64, u64),
    /// Zeroes; the space stays.
    ZeroKeep(u64, u64),
    /// Discards.
    Discard(u64, u64),
    /// Reads, and looks at what comes.
    Read(u64, u64),
    /// Flushes.
    Flush,
    /// Closes the image; what comes next opens it again.
    Close,
    /// Closes the image and makes an internal snapshot.
    Snapshot,
    /// Closes the image and goes back to the last snapshot.
    Apply,
    /// Closes the image and deletes the first snapshot.
    Delete,
}

/// What is done to an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Requests, one after the other in each task. Several tasks run at the same time.
    pub tasks: Vec<Vec<GuestOp>>,
    /// Chooses who goes on when several can.
    pub seed: u64,
    /// How the disk is used.
    pub flags: OpenFlags,
    /// What goes wrong.
    pub fault: Option<Fault>,
}

impl Workload {
    /// Requests one after the other.
    pub fn sequence(ops: Vec<GuestOp>) -> Self {
        Workload { tasks: vec![ops], flags: super::start::usual_flags(), ..Workload::default() }
    }

    /// Whether requests overlap in time.
    pub fn is_concurrent(&self) -> bool {
        self.tasks.len() > 1
    }

    /// Whether internal snapshots are made, applied or deleted.
    pub fn changes_snapshots(&self) -> bool {
        let is_change = |op: &GuestOp| matches!(op, GuestOp::Snapshot | GuestOp::Apply | GuestOp::Delete);
        self.tasks.iter().flatten().any(is_change)
    }

    /// All requests there are.
    pub fn len(&self) -> usize {
        self.tasks.iter().map(Vec::len).sum()
    }

    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for GuestOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestOp::Write(at, len) => write!(f, "w{at}+{len}"),
            GuestOp::Fua(at, len) => write!(f, "W{at}+{len}"),
            GuestOp::WriteZeros(at, len) => write!(f, "x{at}+{len}"),
            GuestOp::WriteSame(at, len) => write!(f, "s{at}+{len}"),
            GuestOp::Zero(at, len) => write!(f, "z{at}+{len}"),
            GuestOp::ZeroKeep(at, len) => write!(f, "Z{at}+{len}"),
            GuestOp::Discard(at, len) => write!(f, "d{at}+{len}"),
            GuestOp::Read(at, len) => write!(f, "r{at}+{len}"),
            GuestOp::Flush => f.write_str("f"),
            GuestOp::Close => f.write_str("c"),
            GuestOp::Snapshot => f.write_str("n"),
            GuestOp::Apply => f.write_str("a"),
            GuestOp::Delete => f.write_str("k"),
        }
    }
}

impl FromStr for GuestOp {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f" => return Ok(GuestOp::Flush),
            "c" => return Ok(GuestOp::Close),
            "n" => return Ok(GuestOp::Snapshot),
            "a" => return Ok(GuestOp::Apply),
            "k" => return Ok(GuestOp::Delete),
            _ => {}
        }
        let bad = || format!("{text:?} is no request of a guest");
        let (kind, numbers) = text.split_at_checked(1).ok_or_else(bad)?;
        let (at, len) = numbers.split_once('+').ok_or_else(bad)?;
        let (at, len) = (at.parse().map_err(|_| bad())?, len.parse().map_err(|_| bad())?);
        Ok(match kind {
            "w" => GuestOp::Write(at, len),
            "W" => GuestOp::Fua(at, len),
            "x" => GuestOp::WriteZeros(at, len),
            "s" => GuestOp::WriteSame(at, len),
            "z" => GuestOp::Zero(at, len),
            "Z" => GuestOp::ZeroKeep(at, len),
            "d" => GuestOp::Discard(at, len),
            "r" => GuestOp::Read(at, len),
            _ => return Err(bad()),
        })
    }
}

/// Letters of the flags: z honor_zeroes, s honor_same, i inform_zeroes, d discard.
fn flags_text(flags: &OpenFlags) -> String {
    let letters = [
        ('z', flags.honor_zeroes),
        ('s', flags.honor_same),
        ('i', flags.inform_zeroes),
        ('d', flags.discard),
    ];
    letters.iter().filter(|(_, is_on)| *is_on).map(|(letter, _)| letter).collect()
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tasks: Vec<String> = self
            .tasks
            .iter()
            .map(|ops| ops.iter().map(GuestOp::to_string).collect::<Vec<_>>().join(","))
            .collect();
        write!(f, "seed={};flags={};", self.seed, flags_text(&self.flags))?;
        if let Some(fault) = &self.fault {
            write!(f, "fault={fault};")?;
        }
        write!(f, "work={}", tasks.join("/"))
    }
}

impl FromStr for Workload {
    type Err = String;
    /// Reads what is printed; words that it does not know are others' affair.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut workload = Workload::default();
        for (key, value) in text.split(';').filter_map(|word| word.split_once('=')) {
            match key {
                "seed" => workload.seed = value.parse().map_err(|_| format!("{value:?} is no seed"))?,
                "flags" => {
                    workload.flags = OpenFlags {
                        honor_zeroes: value.contains('z'),
                        honor_same: value.contains('s'),
                        inform_zeroes: value.contains('i'),
                        discard: value.contains('d'),
                        ..OpenFlags::default()
                    }
                }
                "fault" => {
                    workload.fault = Some(Fault::parse(value).ok_or(format!("{value:?} is no fault"))?);
                }
                "work" => {
                    let ops =
                        |task: &str| task.split(',').filter(|op| !op.is_empty()).map(str::parse).collect();
                    workload.tasks = value.split('/').map(ops).collect::<Result<_, _>>()?;
                }
                _ => {}
            }
        }
        Ok(workload)
    }
}
