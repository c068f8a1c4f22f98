//! What the verbs that change images share: how a disk is written, and asking before something is lost.

use crate::failure::Failure;
use crate::terminal::Terminal;
use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use vellum::io::Driver;
use vellum::{Code, Error, OpenFlags};

/// How a disk is written.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Writing")]
pub struct FlagArgs {
    /// Allocate blocks for zeros that are written where nothing was
    #[arg(long)]
    pub honor_zeroes: bool,
    /// Allocate blocks in a child for data that its parent holds already
    #[arg(long)]
    pub honor_same: bool,
    /// Let the format mark every whole block of zeros, even where data lies
    #[arg(long)]
    pub inform_zeroes: bool,
    /// Let discards give space back; without it they change nothing
    #[arg(long)]
    pub discard: bool,
    /// Answer flushes without carrying them out: data is lost at a power loss
    #[arg(long)]
    pub ignore_flush: bool,
    /// Let other processes write the image at the same time, if they say so, too: raw, fixed VDI and VHD, flat VMDK
    #[arg(long)]
    pub shareable: bool,
    /// Requests go mostly from the start of the disk to its end: let the host read further ahead
    #[arg(long)]
    pub sequential: bool,
    /// Write although the image is marked as damaged or as not closed cleanly
    #[arg(long)]
    pub skip_checks: bool,
    /// Cache of the host
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Cache::Writeback)]
    pub cache: Cache,
    /// Who carries requests out; inline for one at a time, pool for more, if left out
    #[arg(long, value_enum, value_name = "DRIVER")]
    pub driver: Option<DriverChoice>,
}

/// The cache modes that people know from QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// The host's page cache; durable after a flush
    #[default]
    Writeback,
    /// The host's page cache, every write durable when it is done
    Writethrough,
    /// Around the page cache, as --direct
    None,
    /// Around the page cache, every write durable when it is done
    Directsync,
    /// As --ignore-flush
    Unsafe,
}

/// Who carries requests out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DriverChoice {
    /// The thread that asks
    Inline,
    /// A pool of threads
    Pool,
    /// Linux's io_uring
    Uring,
}

impl FlagArgs {
    /// The flags of the disk.
    pub fn flags(&self) -> OpenFlags {
        OpenFlags {
            read_only: false,
            honor_zeroes: self.honor_zeroes,
            honor_same: self.honor_same,
            inform_zeroes: self.inform_zeroes,
            discard: self.discard,
            ignore_flush: self.ignore_flush || self.cache == Cache::Unsafe,
        }
    }

    /// Whether the page cache is gone around.
    pub fn is_direct(&self) -> bool {
        matches!(self.cache, Cache::None | Cache::Directsync)
    }

    /// Whether every write is to be durable when it is done.
    pub fn is_writethrough(&self) -> bool {
        matches!(self.cache, Cache::Writethrough | Cache::Directsync)
    }

    /// The driver for so many requests at a time.
    pub fn driver(&self, depth: usize) -> Driver {
        match self.driver {
            Some(DriverChoice::Inline) => Driver::Inline,
            Some(DriverChoice::Pool) => Driver::Pool,
            Some(DriverChoice::Uring) => Driver::Uring,
            None if depth > 1 => Driver::Pool,
            None => Driver::Inline,
        }
    }
}

/// Asks before something is lost. Without a terminal the answer is no, unless `yes` was given with the command.
pub fn confirm(terminal: &Terminal, question: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if terminal.wants_json() || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        let error = Error::new(Code::Usage, format!("{question} There is no terminal to ask at"));
        return Err(error.hint("nothing was changed; --yes answers the question").into());
    }
    terminal.to_stderr(|out, style| write!(out, "{} [y/N] ", style.warning(question)));
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Error::new(Code::Cancelled, "nothing was changed").into()),
    }
}
