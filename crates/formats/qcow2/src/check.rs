//! `check`: every reference in the image counted and compared with what is stored, as `qemu-img check` does.
//!
//! ```text
//!   header, L1 tables, L2 tables, data, snapshots, bitmaps, refcount structures  ->  expected counts (a Tally)
//!   refcount table -> blocks                                                     ->  stored counts
//!   expected > stored: error    expected < stored: leak    COPIED is not (stored = 1): error
//! ```
//!
//! The tally has a budget; what does not fit is counted in another pass over the tables. Work is bounded: every table
//! is read once a pass however often it is named, and holes are not read.

use crate::compare::Compare;
use crate::entry::COPIED;
use crate::extensions::Extensions;
use crate::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, INCOMPAT_KNOWN};
use crate::judge::Shape;
use crate::plan;
use crate::roots::{Gather, Mode};
use crate::stored::{RefTable, Source, too_much};
use crate::tally::Tally;
use crate::walk::{Look, Walk, find};
use std::sync::Arc;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{
    CheckReport, CheckRequest, Code, Error, FlushPoint, Limits, Result, Severity, Storage, bytes, flush_at,
};

/// Bytes of counts that are kept at a time, and passes at most: 4 TiB of clusters of 64 KiB in one pass.
const TALLY_BUDGET: usize = 64 << 20;
pub(crate) const PASSES_MAX: u32 = 256;

/// `Format::check`.
pub(crate) async fn check(request: CheckRequest) -> Result<CheckReport> {
    let location = request.location.clone();
    let checked = checked(&request, TALLY_BUDGET).await;
    checked.map_err(|error| error.image(location).format("qcow2"))
}

async fn checked(request: &CheckRequest, budget: usize) -> Result<CheckReport> {
    let checker = Checker::new(request.storage.as_ref(), &request.limits, budget).await?;
    let mut report =
        CheckReport { format: "qcow2", storages: vec![request.storage.clone()], ..CheckReport::default() };
    let found = checker.look(&mut report).await?;
    if request.plan {
        plan::plan(&checker, &found, &mut report).await?;
    }
    Ok(report)
}

/// Counts every cluster of a dirty image anew and mends what disagrees, before the first write of a session: refcounts
/// and COPIED flags, in place or by new refcount structures behind the end of the file; then the dirty mark is gone.
///
/// For `begin`: nothing of the image may be cached, or everything must be read again, the header too. Returns the header
/// as it stands in the file then: the refcount table may have moved, and the file may have grown. A crash at any point
/// leaves an image that is still dirty and no worse.
///
/// # Errors
/// `DIRTY` if guest data would have to be given up: that is for the user to decide (`vellum repair`). Those of storage.
pub(crate) async fn recount(storage: &Arc<dyn Storage>, limits: &Limits) -> Result<Header> {
    let mut report =
        CheckReport { format: "qcow2", storages: vec![storage.clone()], ..CheckReport::default() };
    {
        let checker = Checker::new(storage.as_ref(), limits, TALLY_BUDGET).await?;
        let found = checker.look(&mut report).await?;
        let unmended = plan::plan(&checker, &found, &mut report).await?;
        if unmended > 0 || report.fixes.iter().any(|fix| fix.is_lossy) {
            return Err(Error::new(Code::Dirty, "the image was not closed cleanly and is damaged")
                .field("incompatible_features")
                .at(72)
                .found(format!("{} errors", report.errors))
                .hint("`vellum check` lists them, `vellum repair` mends them, and says first what is lost"));
        }
    }
    for fix in &report.fixes {
        for patch in &fix.patches {
            write_slice(storage.as_ref(), patch.offset, &patch.bytes).await?;
        }
        flush_at(FlushPoint::Other, storage.as_ref()).await?;
    }
    let file_len = storage.len()?;
    let head = read_vec(storage.as_ref(), 0, bytes::index(file_len.min(112))?).await?;
    Header::read(&head, file_len, limits)
}

/// What a check works with.
pub(crate) struct Checker<'a> {
    pub source: Source<'a>,
    pub header: Header,
    pub extensions: Extensions,
    pub shape: Shape,
    pub limits: &'a Limits,
    pub table: RefTable,
    /// The header names no refcount table that could be read.
    pub no_table: bool,
    pub budget: usize,
}

/// What a look says to the plan.
#[derive(Default)]
pub(crate) struct Found {
    /// The refcount structures must be made anew.
    pub rebuild: bool,
    /// Leaks or errors of any kind.
    pub anything: bool,
    /// One more than the highest cluster that is referred to or lies in the file.
    pub clusters: u64,
}

impl<'a> Checker<'a> {
    pub async fn new(storage: &'a dyn Storage, limits: &'a Limits, budget: usize) -> Result<Self> {
        let source = Source::new(storage)?;
        let head = source.read(0, source.len.min(112)).await?;
        let (header, no_table) = lenient(&head, source.len, limits)?;
        let cluster_0 = source.read(0, source.len.min(header.cluster())).await?;
        let extensions = Extensions::read(&header, &cluster_0)?;
        let unknown = header.incompatible & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Error::new(Code::Feature, "the image needs features that are not implemented")
                .field("incompatible_features")
                .at(72)
                .found(format!("{unknown:#x}"))
                .allowed("bits 0 to 4")
                .hint("check it with the tool that wrote it"));
        }
        let table = RefTable::load(&source, &header).await?;
        let shape = Shape::new(&header, source.len);
        Ok(Checker { source, header, extensions, shape, limits, table, no_table, budget })
    }

    pub fn gather(&self) -> Gather<'_> {
        Gather {
            source: &self.source,
            header: &self.header,
            extensions: &self.extensions,
            shape: &self.shape,
            limits: self.limits,
        }
    }

    /// Counts, compares and notes what is wrong.
    pub async fn look(&self, report: &mut CheckReport) -> Result<Found> {
        let clusters = self.source.len.div_ceil(self.shape.cluster.max(1)).saturating_add(1);
        let mut indices = 0..bytes::wide(self.table.entries.len());
        let unusable = indices.any(|index| self.table.usable(index, clusters).is_err());
        let mut found = Found { rebuild: self.no_table || unusable, ..Found::default() };
        self.marks(report);
        if self.no_table {
            report.find(Severity::Error, Code::Corrupt, "the refcount table cannot be read", Some(48));
        }
        let roots = self.gather().roots(Mode::Stands, report).await?;
        let walk = Walk { source: &self.source, shape: &self.shape, roots: &roots, mended: false };
        let mut compare = Compare::new(self, self.blocks());
        let mut from = 0u64;
        for pass in 0.. {
            if pass >= PASSES_MAX {
                return Err(self.too_scattered());
            }
            let mut tally = Tally::new(from, self.budget);
            let counted = (!self.no_table).then_some((&self.table, self.header.refcount_table_offset));
            walk.count(&mut tally, counted, (pass == 0).then_some(&mut *report)).await?;
            let is_suspect = compare.pass(&mut tally, report, &mut found).await?;
            if is_suspect {
                self.flags(&walk, &tally, report).await?;
            }
            from = tally.range().end;
            found.clusters = found.clusters.max(self.clusters(&tally));
            if from == u64::MAX {
                break;
            }
        }
        report.end_offset = compare.end.saturating_mul(self.shape.cluster);
        found.anything = !report.is_clean();
        Ok(found)
    }

    fn marks(&self, report: &mut CheckReport) {
        let marks = [
            (INCOMPAT_DIRTY, Code::Dirty, "marked dirty: the refcounts may be stale"),
            (INCOMPAT_CORRUPT, Code::CorruptFlag, "marked corrupt"),
        ];
        for (_, code, what) in marks.iter().filter(|(bit, ..)| self.header.incompatible & bit != 0) {
            report.find(Severity::Note, *code, format!("the image is {what}"), Some(72));
        }
    }

    /// Clusters of the file, and what is referred to just behind its end.
    pub fn clusters(&self, tally: &Tally) -> u64 {
        self.source.len.div_ceil(self.shape.cluster.max(1)).max(tally.end())
    }

    /// The clusters of the refcount blocks, in order.
    pub fn blocks(&self) -> Vec<u64> {
        let clusters = self.source.len.div_ceil(self.shape.cluster.max(1)).saturating_add(1);
        let indices = 0..bytes::wide(self.table.entries.len());
        let usable = indices.filter_map(|index| self.table.usable(index, clusters).ok().flatten());
        let mut blocks: Vec<u64> = usable.map(|offset| self.shape.number(offset)).collect();
        blocks.sort_unstable();
        blocks
    }

    /// The error for counts that are scattered over too many places.
    pub fn too_scattered(&self) -> Error {
        too_much(
            "the image refers to clusters that lie too far apart to be counted",
            "L2 tables",
            format!("more than {PASSES_MAX} passes"),
            format!("{} MiB of counts in each of {PASSES_MAX} passes", self.budget >> 20),
        )
    }

    /// Notes the COPIED flags that disagree with the stored counts.
    async fn flags(&self, walk: &Walk<'_>, tally: &Tally, report: &mut CheckReport) -> Result<()> {
        let l1 = self.header.l1_table_offset;
        walk.flags(tally, Some(&self.table), &mut |look| match look {
            Look::L1 { index, word, number } => {
                if tally.is_single(number) != (word & COPIED != 0) {
                    let message = format!("L1 entry {word:#018x}: COPIED and refcount disagree");
                    find(
                        report,
                        1,
                        Code::Corrupt,
                        &message,
                        Some(l1.saturating_add(index.saturating_mul(8))),
                    );
                }
            }
            Look::L2 { at, entry, number: Some(number), times, .. } => {
                if tally.is_single(number) != (entry.word & COPIED != 0) {
                    let message = format!("L2 entry {:#018x}: COPIED and refcount disagree", entry.word);
                    find(report, times, Code::Corrupt, &message, Some(at));
                }
            }
            Look::L2 { .. } => {}
        })
        .await
    }
}

/// The header; one whose refcount table cannot be is read with an empty table (`true`).
fn lenient(head: &[u8], file_len: u64, limits: &Limits) -> Result<(Header, bool)> {
    let error = match Header::read(head, file_len, limits) {
        Ok(header) => return Ok((header, false)),
        Err(error) => error,
    };
    // Whether only the refcount table is at fault shows when another place is put in.
    let mut other = head.to_vec();
    let bits = bytes::be32(head, 5).unwrap_or(0);
    let cluster = 1u64.checked_shl(bits).unwrap_or(0);
    let one_cluster = 1u32.to_be_bytes();
    let mut candidates = (1..4u64).chain([file_len.checked_div(cluster).unwrap_or(0).saturating_sub(1)]);
    let fits = candidates.find_map(|number| {
        let place = number.checked_mul(cluster)?.to_be_bytes();
        for (at, with) in [(48usize, &place[..]), (56, &one_cluster[..])] {
            other.get_mut(at..at.checked_add(with.len())?)?.copy_from_slice(with);
        }
        Header::read(&other, file_len, limits).ok()
    });
    match fits {
        Some(header) => Ok((Header { refcount_table_offset: 0, refcount_table_clusters: 0, ..header }, true)),
        None => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_conformance::format::{Model, Recipe, write_image};
    use vellum_core::{Events, Format, Location, Memory, block_on};
    use vellum_sim::MemoryFiles;

    fn request(storage: Arc<dyn Storage>) -> CheckRequest {
        CheckRequest {
            storage,
            location: Location("t".into()),
            resolver: MemoryFiles::new(),
            limits: Limits::default(),
            events: Events::default(),
            plan: true,
        }
    }

    /// An image of small clusters over several chunks of the tally, with damage all over.
    fn damaged() -> Arc<Memory> {
        let files = MemoryFiles::new();
        let format: Arc<dyn Format> = Arc::new(crate::Qcow2);
        let runs: Vec<(u64, usize)> = (0..12).map(|i| (i << 20, 700_000)).collect();
        let recipe = Recipe::options(&[("cluster_size", "512"), ("refcount_bits", "2")]);
        write_image(&format, &files, "t", &recipe, &Model::with_runs(13 << 20, &runs)).unwrap();
        let file = files.get("t").unwrap();
        let mut bytes = file.to_vec();
        let l1 = bytes::be64(&bytes, 5).unwrap();
        for index in (0..200u64).step_by(7) {
            let entry = (l1 + index * 8) as usize;
            let l2 = (bytes::be64(&bytes[entry..], 0).unwrap() & crate::entry::OFFSET_MASK) as usize;
            if l2 != 0 {
                bytes[entry] ^= 0x80;
                bytes[l2 + 8] ^= 0x80;
                bytes[l2 + 22] ^= 0x40;
            }
        }
        let table = bytes::be64(&bytes, 6).unwrap() as usize;
        for index in 0..8 {
            let block = bytes::be64(&bytes[table + index * 8..], 0).unwrap() as usize;
            bytes[block + 100..block + 110].fill(0xe4);
        }
        Arc::new(Memory::from_bytes("t", &bytes))
    }

    #[test]
    fn many_passes_find_and_plan_what_one_does() {
        let storage = damaged();
        let one = block_on(checked(&request(storage.clone()), TALLY_BUDGET)).unwrap();
        let many = block_on(checked(&request(storage.clone()), 12_000)).unwrap();
        assert!(one.errors > 50 && one.leaks > 50, "{} errors, {} leaks", one.errors, one.leaks);
        assert_eq!((one.errors, one.leaks, one.leaked_bytes), (many.errors, many.leaks, many.leaked_bytes));
        assert_eq!((one.end_offset, one.allocated_bytes), (many.end_offset, many.allocated_bytes));
        let carried_out = |report: &CheckReport| {
            let image = Memory::from_bytes("t", &storage.to_vec());
            for patch in report.fixes.iter().flat_map(|fix| &fix.patches) {
                block_on(write_slice(&image, patch.offset, &patch.bytes)).unwrap();
            }
            image.to_vec()
        };
        let mended = carried_out(&one);
        assert!(mended == carried_out(&many), "the plans differ");
        let again = block_on(checked(&request(Arc::new(Memory::from_bytes("t", &mended))), 12_000)).unwrap();
        assert!(again.is_clean() && again.fixes.is_empty(), "{:#?}", again.findings);
    }

    #[test]
    fn references_that_lie_too_far_apart_are_refused() {
        let storage = Memory::new("t", 1 << 50);
        let mut head = [0u8; 104];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        (head[23], head[99], head[103]) = (16, 4, 104);
        head[36..40].copy_from_slice(&1u32.to_be_bytes());
        head[40..48].copy_from_slice(&0x30000u64.to_be_bytes());
        head[48..56].copy_from_slice(&0x10000u64.to_be_bytes());
        head[59] = 1;
        let l2: Vec<u8> = (1..2000u64).flat_map(|i| (i << 36 | 1 << 63).to_be_bytes()).collect();
        for (at, bytes) in [(0, &head[..]), (0x30000, &(0x40000u64).to_be_bytes()), (0x40000, &l2)] {
            block_on(write_slice(&storage, at, bytes)).unwrap();
        }
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let error = block_on(checked(&request(storage.clone()), 12_000)).err().unwrap();
        assert_eq!(error.code(), Code::TableLimit, "{error}");
        let request = CheckRequest { plan: false, ..request(storage) };
        let report = block_on(checked(&request, TALLY_BUDGET)).unwrap();
        // Header, L1, L2, refcount table; the clusters; their flags.
        assert_eq!(report.errors, 4 + 1999 + 1999);
    }
}
