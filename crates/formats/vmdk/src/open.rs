//! Putting a disk together from its descriptor and its extents. Nothing is written, and no file is touched but those that
//! the descriptor names, through the resolver.

use crate::descriptor::{self, Descriptor, ExtentAccess, ExtentKind, ExtentLine};
use crate::extent::SparseExtent;
use crate::header::{
    CowdHeader, FLAG_COMPRESSED, GD_AT_END, Hosted, MAGIC_COWD, MAGIC_KDMV, MAGIC_SESPARSE, MARKER_FOOTER,
    Marker, SECTOR, SeSparseConstHeader, SeSparseVolatileHeader, SparseExtentHeader, parse,
};
use crate::image::{Part, Source, VmdkImage};
use crate::info::{self, Facts};
use crate::tables::Tables;
use crate::{open_write, problem};
use std::sync::Arc;
use vellum_core::bytes::{add, array, index, le64, mul, rem, sub};
use vellum_core::storage::read_vec;
use vellum_core::{Access, Asker, Buf, Code, Error, OpenRequest, Printable, Result, Storage};

/// Bytes read first: the longest header.
const HEAD_BYTES: u64 = 2048;

/// Opens what stands at `request.storage`: a descriptor, or a sparse extent.
pub(crate) async fn open(request: OpenRequest) -> Result<VmdkImage> {
    let len = request.storage.len()?;
    let head = read_head(request.storage.as_ref(), len).await?;
    match array::<4>(&head, 0) {
        Some(MAGIC_KDMV) => open_hosted(request, &head, len).await,
        Some(MAGIC_COWD) => open_bare_esx(request, &head, len).await,
        _ if le64(&head, 0) == Some(MAGIC_SESPARSE) => open_bare_esx(request, &head, len).await,
        _ if descriptor::looks_like_one(&head) => open_descriptor(request, len).await,
        found => Err(problem(Code::BadMagic, "this is not a VMDK", "magic", 0)
            .found(format!("{:02x?}", found.unwrap_or_default()))
            .allowed("KDMV, COWD, a seSparse header or \"# Disk DescriptorFile\"")
            .hint("let the format be recognised: leave out the format option")),
    }
}

async fn read_head(storage: &dyn Storage, len: u64) -> Result<Buf> {
    read_vec(storage, 0, index(len.min(HEAD_BYTES))?).await.map_err(|e| e.context("reading the header"))
}

/// A stand-alone descriptor.
async fn open_descriptor(request: OpenRequest, len: u64) -> Result<VmdkImage> {
    if len > request.limits.descriptor_bytes {
        return Err(Error::new(Code::TableLimit, "the descriptor is larger than the limit")
            .found(format!("{len} bytes"))
            .allowed(format!("up to {} bytes", request.limits.descriptor_bytes))
            .hint("raise the limit `descriptor_bytes` if you trust the file"));
    }
    let text = read_vec(request.storage.as_ref(), 0, index(len)?).await?;
    let descriptor = descriptor::parse(&text, 0, &request.limits)?;
    Assembly::new(request).finish(descriptor, None).await
}

/// A hosted sparse extent: the whole disk with its embedded descriptor, a mere container of one, or a lone extent.
async fn open_hosted(request: OpenRequest, head: &[u8], len: u64) -> Result<VmdkImage> {
    let header: SparseExtentHeader = parse(head, 0)?;
    header.check_kind(0)?;
    let mut descriptor = None;
    if let Some((offset, bytes)) = header.descriptor(len, request.limits.descriptor_bytes)? {
        let text = read_vec(request.storage.as_ref(), offset, index(bytes)?).await?;
        let found = descriptor::parse(&text, offset, &request.limits)?;
        if !found.pairs.is_empty() || !found.extents.is_empty() {
            descriptor = Some(found);
        }
    }
    let mut assembly = Assembly::new(request);
    if header.is_container() {
        let Some(descriptor) = descriptor else {
            return Err(problem(
                Code::Corrupt,
                "the file holds neither a disk nor a descriptor",
                "descriptorOffset",
                28,
            )
            .found(header.descriptor_offset.get())
            .hint("the descriptor was wiped; restore the file from a backup"));
        };
        return assembly.finish(descriptor, Some(header)).await;
    }
    let own = assembly.storages.len();
    let storage = assembly.request.storage.clone();
    let (hosted, header) = hosted(storage.as_ref(), header, len).await?;
    let extent = SparseExtent::hosted(own, storage.name(), len, &hosted)?;
    assembly.own = Some(Box::new(extent));
    assembly.warnings.extend(hosted.warnings);
    let descriptor = descriptor.unwrap_or_else(|| {
        assembly.warnings.push(
            "the file has no descriptor: it may be one extent of a larger disk, or a snapshot of one; \
             if there is a descriptor, open that"
                .to_owned(),
        );
        Descriptor::default()
    });
    assembly.finish(descriptor, Some(header)).await
}

/// Checks the header of a hosted extent, following it to its footer.
async fn hosted(
    storage: &dyn Storage,
    header: SparseExtentHeader,
    len: u64,
) -> Result<(Hosted, SparseExtentHeader)> {
    if header.gd_offset.get() != GD_AT_END {
        return Ok((header.check(len, 0)?, header));
    }
    let (footer, at) = footer(storage, len).await?;
    let mut hosted = footer.check(len, at)?;
    if footer.capacity != header.capacity || footer.grain_size != header.grain_size {
        hosted
            .warnings
            .push("header and footer disagree about the size of the disk; the footer is used".into());
    }
    Ok((hosted, footer))
}

/// The footer of a stream: footer marker, footer, end-of-stream marker are the last three sectors.
async fn footer(storage: &dyn Storage, len: u64) -> Result<(SparseExtentHeader, u64)> {
    let whole = sub(len, rem(len, SECTOR)?)?;
    let truncated = || {
        problem(Code::Truncated, "the stream has no footer: it was cut off", "gdOffset", 56)
            .found(format!("{len} bytes without a footer at their end"))
            .allowed("footer marker, footer and end-of-stream marker in the last 1536 bytes")
            .hint("copy or download the file again; its grain directory stood at the end and is lost")
    };
    let Some(start) = whole.checked_sub(mul(3, SECTOR)?).filter(|start| *start >= SECTOR) else {
        return Err(truncated());
    };
    let tail = read_vec(storage, start, index(mul(3, SECTOR)?)?).await?;
    let marker: Marker = parse(&tail, start)?;
    let end: Marker = parse(tail.get(1024..).unwrap_or_default(), start)?;
    let ended = end.val.get() == 0 && end.size.get() == 0 && end.kind.get() == 0;
    if marker.size.get() != 0 || marker.kind.get() != MARKER_FOOTER || !ended {
        return Err(truncated());
    }
    let at = add(start, SECTOR)?;
    let footer: SparseExtentHeader = parse(tail.get(512..).unwrap_or_default(), at)?;
    if footer.gd_offset.get() == GD_AT_END {
        return Err(problem(
            Code::Range,
            "the footer does not say where the directory is",
            "gdOffset",
            add(at, 56)?,
        )
        .found("0xffffffffffffffff")
        .allowed("a sector of the file")
        .hint("the stream was not finished by its writer; make it again from its source"));
    }
    Ok((footer, at))
}

/// An ESX extent that was named without its descriptor. Nearly all are deltas of another disk that only the descriptor
/// names, so reading one alone would give zeros where the other disk has data.
async fn open_bare_esx(request: OpenRequest, head: &[u8], len: u64) -> Result<VmdkImage> {
    if request.open_parts {
        return Err(Error::new(
            Code::ParentMissing,
            "this is an extent of an ESX snapshot; which disk it belongs to stands in its descriptor",
        )
        .hint("open the descriptor (the small .vmdk file beside it, without -delta or -sesparse)"));
    }
    let storage = request.storage.clone();
    let mut assembly = Assembly::new(request);
    let extent = esx(0, storage.as_ref(), head, len).await?;
    assembly.warnings.push("this is an extent; its descriptor stands in another file".to_owned());
    assembly.own = Some(Box::new(extent));
    assembly.finish(Descriptor::default(), None).await
}

/// A COWD or seSparse extent.
async fn esx(file: usize, storage: &dyn Storage, head: &[u8], len: u64) -> Result<SparseExtent> {
    let name = storage.name();
    if array::<4>(head, 0) == Some(MAGIC_COWD) {
        let header: CowdHeader = parse(head, 0)?;
        return SparseExtent::cowd(file, name, len, &header.check(len)?);
    }
    let header: SeSparseConstHeader = parse(head, 0)?;
    let checked = header.check(len)?;
    let volatile = read_vec(storage, checked.volatile_header, index(SECTOR)?).await?;
    let volatile: SeSparseVolatileHeader = parse(&volatile, checked.volatile_header)?;
    volatile.check(checked.volatile_header)?;
    SparseExtent::sesparse(file, name, len, &checked)
}

/// A disk being put together.
struct Assembly {
    request: OpenRequest,
    storages: Vec<Arc<dyn Storage>>,
    parts: Vec<Part>,
    warnings: Vec<String>,
    /// The sparse extent in the file that was named; storage 0.
    own: Option<Box<SparseExtent>>,
    /// Names that were opened, and their index in `storages`.
    opened: Vec<(String, usize)>,
    /// Ranges of files that extents stand on: storage, start, end, line.
    claims: Vec<(usize, u64, u64, u64)>,
    compressed: bool,
    /// The extent being added must not be written.
    is_read_only: bool,
    /// Files that some extent may write.
    written: Vec<String>,
}

impl Assembly {
    fn new(request: OpenRequest) -> Self {
        Assembly {
            request,
            storages: Vec::new(),
            parts: Vec::new(),
            warnings: Vec::new(),
            own: None,
            opened: Vec::new(),
            claims: Vec::new(),
            compressed: false,
            is_read_only: false,
            written: Vec::new(),
        }
    }

    async fn finish(
        mut self,
        descriptor: Descriptor,
        header: Option<SparseExtentHeader>,
    ) -> Result<VmdkImage> {
        let has_own = self.own.is_some();
        if let Some(own) = &self.own {
            Tables::admit(own.file, own.file_len())?;
            self.storages.push(self.request.storage.clone());
            self.claims.push((0, 0, own.file_len(), 0));
        }
        self.add_extents(&descriptor).await?;
        if let Some(own) = self.own.take() {
            if !descriptor.extents.is_empty() {
                return Err(Error::new(
                    Code::Corrupt,
                    "the embedded descriptor does not mention the extent that it stands in",
                )
                .hint("the descriptor belongs to another disk; restore it from a backup"));
            }
            self.push_part(own.capacity, Source::Sparse(own))?;
        }
        self.check_claims()?;
        if self.request.open_parts && descriptor.pairs.iter().any(|p| starts_with(&p.key, "encryption")) {
            return Err(Error::new(
                Code::Feature,
                "the disk is encrypted by VMware, which is not implemented",
            )
            .hint("remove the encryption in the product that made it"));
        }
        self.warnings.extend(descriptor.warnings.iter().cloned());
        let size = self.parts.last().map_or(0, |part| part.end);
        let grain = self.parts.iter().find_map(|part| match &part.source {
            Source::Sparse(extent) => Some(extent.grain),
            _ => None,
        });
        let facts = Facts { header, size, grain, embedded: has_own, compressed: self.compressed };
        let warnings = std::mem::take(&mut self.warnings);
        let info = info::describe(&self.request, &descriptor, facts, warnings)?;
        let writer = match self.request.write {
            true => {
                let sources = (&self.request, &descriptor, &info);
                Some(open_write::prepare(sources, &mut self.parts, &self.storages).await?)
            }
            false => None,
        };
        // Without its parts an image is only looked at (`info`, the search for a parent): what is odd stands in its info.
        for warning in info.warnings.iter().chain(&info.dirty).filter(|_| self.request.open_parts) {
            self.request.events.warn(&format!("{}: {warning}", self.request.location));
        }
        let tables = Tables::new(self.storages.clone(), self.request.limits.table_cache_bytes)?;
        let (storages, parts, events) = (self.storages, self.parts, self.request.events);
        Ok(VmdkImage { info, storages, parts, tables, zlib: vellum_codec::zlib(None)?, events, writer })
    }

    async fn add_extents(&mut self, descriptor: &Descriptor) -> Result<()> {
        let lines: Vec<&ExtentLine> = descriptor.extents.iter().filter(|line| line.sectors > 0).collect();
        let written = lines.iter().filter(|line| line.access == ExtentAccess::ReadWrite);
        self.written = written.filter_map(|line| line.name.clone()).collect();
        for (number, line) in lines.iter().enumerate() {
            self.is_read_only = line.access != ExtentAccess::ReadWrite;
            let last = number.checked_add(1) == Some(lines.len());
            self.add_extent(line, last).await.map_err(|error| {
                let name = line.name.as_deref().unwrap_or("ZERO");
                error.context(format!(
                    "opening extent {} ({}), named at byte {:#x} of the descriptor",
                    number.saturating_add(1),
                    Printable(name),
                    line.at
                ))
            })?;
        }
        if lines.is_empty() && self.own.is_none() && descriptor.extents.is_empty() {
            return Err(Error::new(Code::Corrupt, "the descriptor names no extent")
                .allowed("at least one line like `RW 4192256 SPARSE \"disk-s001.vmdk\"`")
                .hint("the descriptor is damaged or cut off; restore it from a backup"));
        }
        Ok(())
    }

    async fn add_extent(&mut self, line: &ExtentLine, last: bool) -> Result<()> {
        let bytes = mul(line.sectors, SECTOR)?;
        let sparse = matches!(line.kind, ExtentKind::Sparse | ExtentKind::VmfsSparse | ExtentKind::SeSparse);
        let name = match &line.name {
            Some(name) if line.kind != ExtentKind::Zero => name.clone(),
            _ => return self.push_part(bytes, Source::Zero),
        };
        if line.access == ExtentAccess::NoAccess {
            return self.push_part(bytes, Source::NoAccess);
        }
        if sparse && let Some(own) = self.own.take() {
            // The first sparse extent is the file that holds the descriptor, whatever it was renamed to.
            return self.push_sparse(bytes, own, last);
        }
        if !self.request.open_parts {
            return self.push_part(bytes, Source::Closed(name));
        }
        if matches!(line.kind, ExtentKind::VmfsRdm | ExtentKind::VmfsRaw) {
            return Err(Error::new(
                Code::Feature,
                "the extent maps a LUN of an ESX host; its data is not in a file",
            )
            .found(line.kind.word())
            .hint("copy the disk on its host: `vmkfstools -i` makes a disk with its own data"));
        }
        let storage = self.open_part(&name).await?;
        if sparse {
            let extent = self.open_sparse(storage, line.kind).await?;
            self.claims.push((storage, 0, extent.file_len(), line.at));
            return self.push_sparse(bytes, Box::new(extent), last);
        }
        let offset = mul(line.offset, SECTOR)?;
        let end = add(offset, bytes)?;
        let len = self.storage(storage)?.len()?;
        if end > len {
            return Err(Error::new(Code::Truncated, "the file of a flat extent is shorter than the extent")
                .image(self.storage(storage)?.name())
                .field("extent sectors")
                .at(line.at)
                .found(format!("{len} bytes"))
                .allowed(format!("at least {end} bytes"))
                .hint("the file is truncated; copy it again from its source"));
        }
        self.claims.push((storage, offset, end, line.at));
        self.push_part(bytes, Source::Flat { storage, offset })
    }

    fn storage(&self, number: usize) -> Result<&Arc<dyn Storage>> {
        self.storages.get(number).ok_or_else(|| Error::new(Code::Usage, "a storage that was not opened"))
    }

    /// Opens the file of an extent, once.
    async fn open_part(&mut self, name: &str) -> Result<usize> {
        if let Some((_, number)) = self.opened.iter().find(|(known, _)| known == name) {
            return Ok(*number);
        }
        let asker = Asker::Part { of: self.request.location.clone() };
        let access = {
            let write = self.request.write && self.written.iter().any(|written| written == name);
            Access { write, shareable: write && self.request.access.shareable, ..self.request.access }
        };
        let opened = self.request.resolver.open(name, &asker, access).await.map_err(|error| {
            let missing = error.code() == Code::NotFound;
            let error = error.image(&self.request.location).field("extent file").found(name);
            if missing {
                error.hint("the disk consists of several files; put all of them into the same directory")
            } else {
                error
            }
        })?;
        let id = opened.storage.id();
        let is_self =
            opened.location == self.request.location || (id.is_some() && id == self.request.storage.id());
        if is_self {
            return Err(Error::new(Code::Cycle, "an extent names the descriptor itself")
                .image(&self.request.location)
                .field("extent file")
                .found(name)
                .allowed("a file that holds the extent's data")
                .hint("the descriptor is damaged, or made to mislead; restore it from a backup"));
        }
        let known = self.storages.iter().position(|other| id.is_some() && other.id() == id);
        let number = known.unwrap_or(self.storages.len());
        if known.is_none() {
            self.storages.push(opened.storage);
        }
        self.opened.push((name.to_owned(), number));
        Ok(number)
    }

    async fn open_sparse(&mut self, number: usize, kind: ExtentKind) -> Result<SparseExtent> {
        let storage = self.storage(number)?.clone();
        let name = storage.name().to_owned();
        let extent = async {
            let len = storage.len()?;
            Tables::admit(number, len)?;
            let head = read_head(storage.as_ref(), len).await?;
            let esx_magic =
                array::<4>(&head, 0) == Some(MAGIC_COWD) || le64(&head, 0) == Some(MAGIC_SESPARSE);
            if kind == ExtentKind::SeSparse && le64(&head, 0) != Some(MAGIC_SESPARSE) {
                return Err(problem(Code::BadMagic, "this is not a seSparse extent", "magic", 0)
                    .found(format!("{:02x?}", array::<8>(&head, 0).unwrap_or_default()))
                    .allowed("be ba fe ca 00 00 00 00")
                    .hint("the descriptor names a file that is something else"));
            }
            if esx_magic {
                return esx(number, storage.as_ref(), &head, len).await;
            }
            let header: SparseExtentHeader = parse(&head, 0)?;
            header.check_kind(0)?;
            let (hosted, header) = hosted(storage.as_ref(), header, len).await?;
            self.compressed |= header.flags.get() & FLAG_COMPRESSED != 0;
            if header.unclean_shutdown != 0 {
                self.warnings.push(format!("the extent {name} was not closed cleanly"));
            }
            self.warnings.extend(hosted.warnings.iter().map(|warning| format!("{name}: {warning}")));
            SparseExtent::hosted(number, &name, len, &hosted)
        };
        extent.await.map_err(|error| error.image(&name))
    }

    /// Adds a sparse extent whose line says `bytes`. Where line and header disagree, the smaller holds; but only the
    /// end of a disk can be cut, since a shorter extent would move all that follow.
    fn push_sparse(&mut self, bytes: u64, extent: Box<SparseExtent>, last: bool) -> Result<()> {
        let capacity = extent.capacity;
        if capacity < bytes && !last {
            return Err(problem(
                Code::SizeLie,
                "an extent is smaller than the descriptor says",
                "capacity",
                12,
            )
            .image(&extent.name)
            .found(format!("{capacity} bytes"))
            .allowed(format!("{bytes} bytes"))
            .hint(
                "the file belongs to another disk, or the descriptor was edited; restore them from a backup",
            ));
        }
        // Writers that round the capacity up to a grain are not worth a word.
        if capacity < bytes || capacity.saturating_sub(bytes) >= extent.grain {
            self.warnings.push(format!(
                "{}: the descriptor says {bytes} bytes, the header {capacity}; the smaller is used",
                extent.name
            ));
        }
        self.push_part(bytes.min(capacity), Source::Sparse(extent))
    }

    fn push_part(&mut self, bytes: u64, source: Source) -> Result<()> {
        let start = self.parts.last().map_or(0, |part| part.end);
        if bytes > 0 {
            let is_read_only = self.is_read_only;
            self.parts.push(Part { start, end: add(start, bytes)?, source, is_read_only });
        }
        Ok(())
    }

    /// No two extents stand on the same bytes.
    fn check_claims(&mut self) -> Result<()> {
        self.claims.sort_unstable();
        let pairs = self.claims.iter().zip(self.claims.iter().skip(1));
        for ((storage, _, end, _), (other, start, _, line)) in pairs {
            if storage == other && start < end {
                return Err(problem(
                    Code::Overlap,
                    "two extents stand on the same bytes of a file",
                    "extent file",
                    *line,
                )
                .found(format!("{} from byte {start}", self.storage(*storage)?.name()))
                .allowed(format!("from byte {end}"))
                .hint("the descriptor is damaged; restore it from a backup"));
            }
        }
        Ok(())
    }
}

/// Whether `text` begins with `prefix`, in any case.
fn starts_with(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}
