//! [`Session`]: carries commands out on an open disk, several at a time if asked to.

use super::command::{COMMANDS, Command, Fill, What};
use super::report::{Line, Outcome};
use super::written::{Written, compare};
use crate::failure::Failure;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;
use vellum::{
    Buf, Code, Completion, Disk, Error, Lost, MapEntry, Result, Storage, Vellum, WriteFlags, ZeroMode,
};

/// Bytes that `verify` reads at a time.
const VERIFY_BYTES: u64 = 1 << 20;
/// Requests in flight for commands that do not wait, if `--depth` says nothing.
const LATER_MAX: usize = 64;

/// An open disk, and what was done to it.
pub struct Session<'a> {
    vellum: &'a Vellum,
    open: Box<dyn Fn() -> Result<Disk> + 'a>,
    /// None after it could not be opened again.
    disk: Option<Disk>,
    depth: usize,
    fua: bool,
    written: Written,
    flying: BTreeMap<u64, Flight>,
    answers: Answers,
    issued: u64,
    report: &'a mut dyn FnMut(Line) -> io::Result<()>,
}

/// A request that was not answered yet.
struct Flight {
    command: Command,
    text: String,
    range: Range<u64>,
    changes: bool,
    /// A discard of a disk that does not let any through.
    is_ignored: bool,
    started: Instant,
}

/// What came back: the buffer of a read, or nothing.
type Answer = (Option<Buf>, Result<()>);

/// Both ends of the channel by which answers come, with the number of their request.
type Answers = (Sender<(u64, Answer)>, Receiver<(u64, Answer)>);

/// An answer on its way; [`Lost`] says that it never comes.
struct Done(Answer);

impl Lost for Done {
    fn lost() -> Self {
        Done((None, Lost::lost()))
    }
}

impl<'a> Session<'a> {
    /// A session over the disk that `open` gives. With `fua` every write is durable when it is done.
    pub fn new(
        vellum: &'a Vellum,
        depth: usize,
        fua: bool,
        open: impl Fn() -> Result<Disk> + 'a,
        report: &'a mut dyn FnMut(Line) -> io::Result<()>,
    ) -> Result<Self> {
        let disk = Some(open()?);
        let (open, written) = (Box::new(open), Written::default());
        let (flying, answers, issued) = (BTreeMap::new(), channel(), 0);
        Ok(Session { vellum, open, disk, depth, fua, written, flying, answers, issued, report })
    }

    /// The disk.
    pub fn disk(&self) -> Result<&Disk> {
        self.disk.as_ref().ok_or_else(|| Error::new(Code::Usage, "the disk is not open any more"))
    }

    /// Carries `command` out, or begins to. What it found goes to the report; the error is one of the report.
    pub fn run(&mut self, command: Command, text: &str) -> Result<(), Failure> {
        let waits = !matches!(
            command.what,
            What::Read { .. } | What::Write { .. } | What::Zero { .. } | What::Discard { .. } | What::Help
        );
        if waits {
            self.wait_for(0)?;
        }
        let started = Instant::now();
        let tell = |session: &mut Self, outcome| session.tell(text, &command, None, started, outcome);
        match command.what.clone() {
            What::Read { range, .. } => self.fly(command, text, range, false),
            What::Write { range, .. } | What::Zero { range, .. } | What::Discard { range } => {
                self.fly(command, text, range, true)
            }
            What::Flush => {
                let flushed = self.disk().and_then(|disk| disk.flush().wait());
                tell(self, Outcome::of(flushed))
            }
            What::Wait => tell(self, Outcome::Done),
            What::Verify { range } => {
                let outcome = self.verify(range.unwrap_or(0..u64::MAX));
                tell(self, outcome)
            }
            What::Map { range } => {
                let outcome = self.map(range.unwrap_or(0..u64::MAX));
                tell(self, outcome)
            }
            What::Length => {
                let size = self.disk().map(Disk::size);
                tell(self, size.map_or_else(Outcome::Failed, Outcome::Length))
            }
            What::Flags(changes) => {
                let set = self.disk().and_then(|disk| {
                    let mut flags = disk.flags();
                    changes.into_iter().for_each(|(flag, on)| *flag.of(&mut flags) = on);
                    disk.set_flags(flags).map(|()| flags)
                });
                tell(self, set.map_or_else(Outcome::Failed, Outcome::Flags))
            }
            What::Reopen => {
                let outcome = Outcome::of(self.reopen());
                tell(self, outcome)
            }
            What::Sleep(time) => {
                std::thread::sleep(time);
                tell(self, Outcome::Done)
            }
            What::Abort => {
                tell(self, Outcome::Done)?;
                let killed = signal_hook::low_level::raise(signal_hook::consts::SIGKILL);
                killed.map_err(|error| Error::from_io(error, "the process cannot kill itself").into())
            }
            What::Help => tell(self, Outcome::Text(COMMANDS.to_owned())),
        }
    }

    /// Waits for everything, and closes the disk.
    pub fn close(mut self) -> Result<(), Failure> {
        let waited = self.wait_for(0);
        let closed = self.disk.take().map_or(Ok(()), |disk| disk.close().wait());
        waited?;
        Ok(closed?)
    }

    fn reopen(&mut self) -> Result<()> {
        // The image is locked as long as anything of the disk is there.
        let disk = self.disk.take();
        disk.map_or(Ok(()), |disk| disk.close().wait())?;
        self.disk = Some((self.open)()?);
        Ok(())
    }

    /// Begins a request, and ends it unless more may be in flight.
    fn fly(&mut self, command: Command, text: &str, range: Range<u64>, changes: bool) -> Result<(), Failure> {
        let (later, limit) = (command.later, if self.depth > 1 { self.depth } else { LATER_MAX });
        self.wait_for(limit - 1)?;
        let overlaps = |flight: &Flight| flight.range.start < range.end && range.start < flight.range.end;
        while !later && self.flying.values().any(|flight| overlaps(flight) && (changes || flight.changes)) {
            // In the order in which they were written down, unless they asked not to wait.
            self.wait_for(self.flying.len() - 1)?;
        }
        let is_discard = matches!(command.what, What::Discard { .. });
        let is_ignored = is_discard && self.disk.as_ref().is_some_and(|disk| !disk.flags().discard);
        let changes = changes && !is_ignored;
        if changes {
            self.note_change(&command.what);
        }
        // Of two changes at the same time, either may win.
        let rivals = self.flying.values().filter(|flight| changes && flight.changes && overlaps(flight));
        for other in rivals.map(|flight| flight.range.clone()).collect::<Vec<_>>() {
            self.written.forget(&(other.start.max(range.start)..other.end.min(range.end)));
        }
        self.issued += 1;
        let (id, started, text) = (self.issued, Instant::now(), text.to_owned());
        let request = self.request(&command.what, &range);
        let flight = Flight { command, text, range, changes, is_ignored, started };
        if !later && self.depth == 1 {
            let answer = request.wait();
            return self.land(flight, answer.0);
        }
        self.flying.insert(id, flight);
        let answers = self.answers.0.clone();
        // Nobody listens any more only when the session is over.
        request.on_complete(move |answer| drop(answers.send((id, answer.0))));
        Ok(())
    }

    fn request(&self, what: &What, range: &Range<u64>) -> Completion<Done> {
        let disk = match self.disk() {
            Ok(disk) if range.end <= disk.size() => disk.clone(),
            Ok(disk) => return Completion::ready(Done((None, Err(past_end(disk, range))))),
            Err(error) => return Completion::ready(Done((None, Err(error)))),
        };
        match what {
            What::Read { range, .. } => {
                let done = disk.read_at(Buf::zeroed(len(range)), range.start);
                Completion::from_future(async move {
                    let (buf, result) = done.await;
                    Done((Some(buf), result))
                })
            }
            What::Write { range, fill, fua } => {
                let mut buf = Buf::zeroed(len(range));
                fill.fill(range.start, &mut buf);
                let done = disk.write(buf, range.start, WriteFlags { fua: *fua || self.fua });
                Completion::from_future(async move { Done((None, done.await.1)) })
            }
            What::Zero { range, unmap, fua } => {
                let mode = if *unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                let fua = *fua || self.fua;
                let done = disk.write_zeroes(range.clone(), mode);
                Completion::from_future(async move {
                    let zeroed = done.await;
                    let flushed = if zeroed.is_ok() && fua { disk.flush().await } else { Ok(()) };
                    Done((None, zeroed.and(flushed)))
                })
            }
            _ => {
                let done = disk.discard_range(range.clone());
                Completion::from_future(async move { Done((None, done.await)) })
            }
        }
    }

    /// Waits until at most `most` requests are in flight.
    fn wait_for(&mut self, most: usize) -> Result<(), Failure> {
        while self.flying.len() > most {
            let lost = || Error::new(Code::Lost, "an answer never came");
            let (id, answer) = self.answers.1.recv().map_err(|_| lost())?;
            if let Some(flight) = self.flying.remove(&id) {
                self.land(flight, answer)?;
            }
        }
        Ok(())
    }

    /// A request was answered.
    fn land(&mut self, flight: Flight, answer: Answer) -> Result<(), Failure> {
        let Flight { command, text, range, changes, is_ignored, started } = flight;
        let (buf, result) = answer;
        let outcome = match (result, &command.what, buf) {
            (Err(error), _, _) => {
                if changes {
                    self.written.forget(&range);
                }
                Outcome::Failed(error)
            }
            (Ok(()), What::Read { expect, show, .. }, Some(buf)) => {
                let found = expect.and_then(|fill| compare(fill, range.start, &buf));
                Outcome::Read { verified: expect.is_some(), found, dump: show.then(|| buf.to_vec()) }
            }
            (Ok(()), _, _) if is_ignored => {
                Outcome::Ignored("discard is off; open with --discard, or `flags discard=on`")
            }
            (Ok(()), _, _) => Outcome::Done,
        };
        self.tell(&text, &command, Some(range), started, outcome)
    }

    fn tell(
        &mut self,
        text: &str,
        command: &Command,
        range: Option<Range<u64>>,
        started: Instant,
        outcome: Outcome,
    ) -> Result<(), Failure> {
        let (command, time) = (command.clone(), started.elapsed());
        Ok((self.report)(Line { text: text.to_owned(), command, range, time, outcome })?)
    }

    /// What the disk holds when the request is done.
    fn note_change(&mut self, what: &What) {
        match what {
            What::Write { range, fill, .. } => self.written.set(range.clone(), *fill),
            What::Zero { range, .. } => self.written.set(range.clone(), Fill::Byte(0)),
            // Reads as zeros, or as before.
            What::Discard { range } => self.written.forget(range),
            _ => {}
        }
    }

    fn verify(&self, range: Range<u64>) -> Outcome {
        let (mut bytes, mut found) = (0, Vec::new());
        let disk = match self.disk() {
            Ok(disk) => disk,
            Err(error) => return Outcome::Failed(error),
        };
        for (part, fill) in self.written.within(&range) {
            let mut at = part.start;
            while at < part.end {
                let step = at..part.end.min(at.saturating_add(VERIFY_BYTES));
                let (buf, result) = disk.read_at(Buf::zeroed(len(&step)), at).wait();
                if let Err(error) = result {
                    return Outcome::Failed(error.context("reading back what was written"));
                }
                found.extend(compare(fill, at, &buf));
                bytes += step.end - at;
                at = step.end;
            }
        }
        Outcome::Verified { bytes, found }
    }

    fn map(&self, range: Range<u64>) -> Outcome {
        let mut entries: Vec<MapEntry> = Vec::new();
        let disk = match self.disk() {
            Ok(disk) => disk,
            Err(error) => return Outcome::Failed(error),
        };
        let walked = self.vellum.map(disk, |mut entry| {
            let cut = entry.range.start.max(range.start)..entry.range.end.min(range.end);
            if cut.start < cut.end {
                if let Some((_, offset)) = &mut entry.place {
                    *offset += cut.start - entry.range.start;
                }
                entries.push(MapEntry { range: cut, ..entry });
            }
            Ok(())
        });
        walked.map_or_else(Outcome::Failed, |()| Outcome::Map(entries))
    }
}

fn len(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}

fn past_end(disk: &Disk, range: &Range<u64>) -> Error {
    let size = disk.size();
    Error::new(Code::Usage, "the range goes past the end of the disk")
        .image(disk.name())
        .found(format!("{} to {}", range.start, range.end))
        .allowed(format!("up to {size}"))
}
