//! `repair`: carries out what a check planned, step by step, after it kept every byte that changes.

use crate::backup::{BackedFile, Kind, Writer};
use crate::check::Checked;
use crate::{Control, Progress, Vellum};
use std::ops::Range;
use std::sync::Arc;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{
    Access, Asker, ChainOptions, CheckReport, Code, Completion, Error, Fix, Location, Opened, Preallocate,
    Providers, Resolver, Result, Storage, block_on, bytes,
};

/// Unit in which an interrupted write may have reached the disk or not.
pub(crate) const SECTOR: u64 = 512;
/// Bytes of a backup's record at most.
const STEP: u64 = 1 << 20;

/// What would mend an image. Nothing was changed yet.
pub struct RepairPlan {
    vellum: Vellum,
    name: String,
    options: ChainOptions,
    checked: Checked,
    writable: bool,
}

/// Which steps of a plan are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairChoice {
    /// Only those that give lost space back.
    pub leaks_only: bool,
    /// Those that lose guest data, too.
    pub lossy: bool,
}

/// What a repair did.
#[derive(Clone)]
pub struct RepairReport {
    /// Steps that were carried out.
    pub steps: usize,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Where the bytes stand that were there before; `None` if nothing was changed.
    pub backup: Option<Location>,
    /// What is wrong now.
    pub after: CheckReport,
}

impl Vellum {
    /// Looks what would mend the image. With `write` the image is opened for writing, and kept from others, until the
    /// plan is carried out or dropped.
    pub fn plan_repair(&self, name: &str, options: &ChainOptions, write: bool) -> Result<RepairPlan> {
        let resolver: Arc<dyn Resolver> = match write {
            true => Arc::new(ForWriting(self.resolver.clone())),
            false => self.resolver.clone(),
        };
        let checked = self.examine(name, options, resolver, Access { write, ..Access::default() }, true)?;
        let (vellum, name, options) = (self.clone(), name.to_owned(), options.clone());
        Ok(RepairPlan { vellum, name, options, checked, writable: write })
    }
}

impl RepairPlan {
    /// What is wrong, and all steps.
    pub fn report(&self) -> &CheckReport {
        &self.checked.report
    }

    /// The steps that `choice` wants; the lossy ones are among them, whatever it says of those.
    pub fn steps(&self, choice: RepairChoice) -> Vec<&Fix> {
        self.report().fixes.iter().filter(|fix| fix.is_leak || !choice.leaks_only).collect()
    }

    /// Carries the steps out, in their order, with a flush after each. Before the first change, a backup of all that
    /// they change is durable.
    ///
    /// # Errors
    /// `USAGE` if a step loses data and `choice` does not allow it: then nothing is changed, because later steps may
    /// count on it. After any other error the message names the backup, if something may have been changed.
    pub fn carry_out(self, choice: RepairChoice, progress: &dyn Progress) -> Result<RepairReport> {
        let steps: Vec<Fix> = self.steps(choice).into_iter().cloned().collect();
        if steps.is_empty() {
            let after = self.checked.report;
            return Ok(RepairReport { steps: 0, written_bytes: 0, backup: None, after });
        }
        if !self.writable {
            return Err(Error::new(Code::Usage, "the plan was made without opening the image for writing"));
        }
        let lossy = steps.iter().filter(|step| step.is_lossy).count();
        if lossy > 0 && !choice.lossy {
            return Err(Error::new(Code::Usage, format!("{lossy} of {} steps lose guest data", steps.len()))
                .image(&self.name)
                .hint("nothing was changed; look at the steps with --dry-run, then use --force"));
        }
        let changes = Changes::new(&self.checked.storages, &steps)?;
        progress.begin("repairing", changes.bytes());
        let backup = block_on(self.keep(&changes, &steps))?;
        let written_bytes = match block_on(self.apply(&steps, progress)) {
            Ok(written) => written,
            Err(error) => {
                return Err(error
                    .hint(format!("`vellum repair --undo {backup} {}` takes the repair back", self.name)));
            }
        };
        // Checked anew from what the files hold, and without the lock of a writer.
        drop(self.checked);
        let after = self.vellum.check(&self.name, &self.options).map_err(|error| {
            error.context(format!("checking the repaired image; the bytes before the repair are in {backup}"))
        })?;
        Ok(RepairReport { steps: steps.len(), written_bytes, backup: Some(backup), after })
    }

    /// Writes the backup.
    async fn keep(&self, changes: &Changes, steps: &[Fix]) -> Result<Location> {
        let (resolver, storages) = (self.vellum.resolver.as_ref(), &self.checked.storages);
        let now_unix = Providers::system()?.unix_time;
        let location = self.free_location(now_unix).await?;
        let files: Vec<BackedFile> = storages
            .iter()
            .zip(&changes.0)
            .map(|(storage, change)| BackedFile { len: change.old_len, place: self.place_of(storage) })
            .collect();
        let format = self.checked.report.format;
        let kept = async {
            let of = &self.checked.location;
            let mut writer = Writer::begin(resolver, &location, of, format, now_unix, &files).await?;
            for (file, (storage, change)) in storages.iter().zip(&changes.0).enumerate() {
                keep_file(&mut writer, file, storage.as_ref(), change).await?;
            }
            for step in steps {
                for patch in &step.patches {
                    let parts = patch.bytes.chunks(STEP as usize).zip((0u64..).map(|index| index * STEP));
                    for (part, at) in parts {
                        let at = bytes::add(patch.offset, at)?;
                        writer.append(Kind::Write, patch.storage, at, part).await?;
                    }
                }
                if let Some((file, len)) = step.set_len {
                    writer.append(Kind::Length, file, len, &[]).await?;
                }
            }
            writer.finish(resolver, &location).await
        };
        match kept.await {
            Ok(_) => Ok(location),
            Err(error) => {
                // An unfinished backup is of no use; that it cannot be deleted is the smaller trouble.
                let _ = resolver.delete(&location).await;
                Err(error.context("keeping a backup; the image was not changed"))
            }
        }
    }

    async fn free_location(&self, now_unix: u64) -> Result<Location> {
        let (resolver, image) = (self.vellum.resolver.as_ref(), &self.checked.location);
        let name = resolver.file_name(image);
        // One more for every repair within the same second.
        for second in now_unix..now_unix.saturating_add(1000) {
            let location = resolver.beside(image, &format!("{name}.vellum-backup-{second}"));
            if !resolver.exists(&location).await? {
                return Ok(location);
            }
        }
        Err(Error::new(Code::Exists, "there are too many backups").image(image).hint("delete some of them"))
    }

    /// How the backup names a file of the image.
    fn place_of(&self, storage: &Arc<dyn Storage>) -> String {
        let named = &self.checked.storage;
        let is_named = match (storage.id(), named.id()) {
            (Some(a), Some(b)) => a == b,
            _ => Arc::ptr_eq(storage, named) || storage.name() == named.name(),
        };
        if is_named {
            return String::new();
        }
        let location = Location(storage.name().to_owned());
        self.vellum.resolver.relative(&self.checked.location, &location).unwrap_or(location.0)
    }

    async fn apply(&self, steps: &[Fix], progress: &dyn Progress) -> Result<u64> {
        let storages = &self.checked.storages;
        let mut written = 0;
        for (number, step) in steps.iter().enumerate() {
            let about = |error: Error| {
                let what = format!("step {} of {} of the repair: {}", number + 1, steps.len(), step.what);
                error.context(what)
            };
            if progress.advance(written, written) == Control::Stop {
                let done = format!("stopped after {number} of {} steps of the repair", steps.len());
                return Err(Error::new(Code::Cancelled, done).image(&self.name));
            }
            written += apply_step(storages, step).await.map_err(about)?;
        }
        progress.advance(written, written);
        Ok(written)
    }
}

async fn apply_step(storages: &[Arc<dyn Storage>], step: &Fix) -> Result<u64> {
    let mut written = 0;
    for patch in &step.patches {
        write_slice(file(storages, patch.storage)?, patch.offset, &patch.bytes).await?;
        written += patch.bytes.len() as u64;
    }
    if let Some((index, len)) = step.set_len {
        file(storages, index)?.set_len(len, Preallocate::Off).await?;
    }
    let touched = step.patches.iter().map(|patch| patch.storage).chain(step.set_len.map(|(file, _)| file));
    let mut touched: Vec<usize> = touched.collect();
    touched.sort_unstable();
    touched.dedup();
    for index in touched {
        file(storages, index)?.flush().await?;
    }
    Ok(written)
}

fn file(storages: &[Arc<dyn Storage>], index: usize) -> Result<&dyn Storage> {
    let found = storages.get(index).map(AsRef::as_ref);
    found.ok_or_else(|| Error::new(Code::Usage, "a step of the repair is about a file that is not there"))
}

/// What the steps change of each file.
struct Changes(Vec<Change>);

struct Change {
    old_len: u64,
    /// The shortest that the file becomes on the way.
    min_len: u64,
    /// What is written over or cut off of what was there, in whole sectors, in ascending order.
    ranges: Vec<Range<u64>>,
}

impl Changes {
    fn new(storages: &[Arc<dyn Storage>], steps: &[Fix]) -> Result<Self> {
        let mut changes = Vec::with_capacity(storages.len());
        for storage in storages {
            let len = storage.len()?;
            changes.push(Change { old_len: len, min_len: len, ranges: Vec::new() });
        }
        for step in steps {
            for patch in &step.patches {
                file(storages, patch.storage)?;
                let end = bytes::add(patch.offset, patch.bytes.len() as u64)?;
                if let Some(change) = changes.get_mut(patch.storage) {
                    change.add(patch.offset..end);
                }
            }
            if let Some((index, len)) = step.set_len {
                file(storages, index)?;
                if let Some(change) = changes.get_mut(index) {
                    change.min_len = change.min_len.min(len);
                    change.add(len..u64::MAX);
                }
            }
        }
        changes.iter_mut().for_each(Change::join);
        Ok(Changes(changes))
    }

    fn bytes(&self) -> u64 {
        self.0.iter().flat_map(|change| &change.ranges).map(|range| range.end - range.start).sum()
    }
}

impl Change {
    fn add(&mut self, range: Range<u64>) {
        let start = range.start / SECTOR * SECTOR;
        let end = range.end.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX).min(self.old_len);
        if start < end {
            self.ranges.push(start..end);
        }
    }

    fn join(&mut self) {
        self.ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in self.ranges.drain(..) {
            match joined.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        self.ranges = joined;
    }
}

async fn keep_file(writer: &mut Writer, file: usize, storage: &dyn Storage, change: &Change) -> Result<()> {
    for range in &change.ranges {
        let mut at = range.start;
        while at < range.end {
            let mut end = range.end.min((at / STEP + 1) * STEP);
            if at < change.min_len {
                end = end.min(change.min_len);
            }
            let old = read_vec(storage, at, (end - at) as usize).await?;
            // What is cut off and made longer again reads as zeros by itself.
            if at < change.min_len || !bytes::is_zero(&old) {
                writer.append(Kind::Old, file, at, &old).await?;
            }
            at = end;
        }
    }
    Ok(())
}

/// Opens the parts of an image for writing, for those who only ask for reading.
pub(crate) struct ForWriting(pub Arc<dyn Resolver>);

impl Resolver for ForWriting {
    fn open(&self, name: &str, asker: &Asker, _access: Access) -> Completion<Result<Opened>> {
        self.0.open(name, asker, Access { write: true, ..Access::default() })
    }
    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        self.0.create(location, replace)
    }
    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        self.0.rename(from, to)
    }
    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        self.0.delete(location)
    }
    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        self.0.exists(location)
    }
    fn sync_directory(&self, location: &Location) -> Completion<Result<()>> {
        self.0.sync_directory(location)
    }
    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        self.0.siblings(location)
    }
    fn beside(&self, location: &Location, file_name: &str) -> Location {
        self.0.beside(location, file_name)
    }
    fn file_name(&self, location: &Location) -> String {
        self.0.file_name(location)
    }
    fn relative(&self, from: &Location, to: &Location) -> Option<String> {
        self.0.relative(from, to)
    }
}
