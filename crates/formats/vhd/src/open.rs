//! Opening: the footer is found (section 9), the dynamic header checked, everything becomes information.

use crate::alloc::Writing;
use crate::header::{
    self, CHS_MAX, DYNAMIC_BYTES, DiskType, DynamicHeader, EPOCH, FOOTER_BYTES, FORMAT, Footer, bad,
};
use crate::locator;
use crate::map::{SECTOR, Sparse, Tables, VhdImage};
use crate::survey::Survey;
use vellum_core::storage::{read_only, read_vec};
use vellum_core::{
    Buf, Code, Confidence, Error, Identity, ImageInfo, OpenRequest, ParentRef, Result, Sample, Storage, Uuid,
    Value, bytes,
};
use zerocopy::IntoBytes;

/// Bytes read at either end: footer, copy and usually the dynamic header, in what any storage can read.
const SAMPLE_BYTES: u64 = 4096;
/// Bytes of the footers of Virtual PC before 2004.
const OLD_FOOTER_BYTES: u64 = 511;

/// Recognises an image by a footer at the end, or by the copy at the start.
///
/// A raw disk can hold `conectix` at its end by accident or on purpose: version, type and checksum must be right.
pub(crate) fn probe(sample: &Sample<'_>) -> Confidence {
    let tail = |len: usize| {
        let at = sample.tail.len().checked_sub(len)?;
        Footer::read(sample.tail.get(at..)?)
    };
    let sound = |footer: &Footer| footer.is_sound() && footer.is_known();
    let head = Footer::read(sample.head);
    if [tail(512), tail(511)].iter().flatten().any(sound) {
        return Confidence::Sure;
    }
    match head {
        Some(copy) if sound(&copy) && copy.disk_type() != Some(DiskType::Fixed) => Confidence::Sure,
        Some(copy) if copy.has_cookie() => Confidence::Weak,
        _ => Confidence::No,
    }
}

/// A footer that can be trusted.
pub(crate) struct Found {
    pub(crate) footer: Footer,
    /// Byte offset of it.
    pub(crate) at: u64,
    /// Where data must end: the footer, or the end of the file if the footer is gone.
    pub(crate) data_end: u64,
    /// Why it is not the one at the end.
    pub(crate) torn: Option<String>,
    /// What is odd.
    warnings: Vec<String>,
}

impl Found {
    /// A footer at byte `at` of a file of `len` bytes, whose checksum was made right.
    pub(crate) fn mended(footer: Footer, at: u64, len: u64) -> Self {
        let is_copy = at == 0 && len != FOOTER_BYTES;
        Found {
            footer,
            at,
            data_end: if is_copy { len } else { at },
            torn: is_copy.then(|| "the footer at the end of the file is missing or damaged".to_owned()),
            warnings: Vec::new(),
        }
    }

    /// Where the footer goes when it is written anew; `used` is where the last block ends.
    pub(crate) fn footer_at(&self, len: u64, used: u64) -> Result<u64> {
        // What stands in the place of a torn footer is written over if it is nobody's.
        match len.checked_sub(FOOTER_BYTES) {
            Some(last) if self.torn.is_some() && last >= used && bytes::rem(last, SECTOR)? == 0 => Ok(last),
            _ => bytes::align_up(self.data_end.max(used), SECTOR),
        }
    }
}

/// Head and tail of the file.
pub(crate) struct Ends {
    pub(crate) len: u64,
    head: Buf,
    tail: Buf,
    tail_at: u64,
}

impl Ends {
    pub(crate) async fn read(storage: &dyn Storage) -> Result<Self> {
        let len = storage.len()?;
        if len < FOOTER_BYTES {
            return Err(bad(Code::Truncated, "footer", 0, "the file is shorter than a footer")
                .found(format!("{len} bytes"))
                .allowed("at least 512"));
        }
        let head = read_vec(storage, 0, bytes::index(len.min(SAMPLE_BYTES))?).await?;
        let tail_at = len.saturating_sub(SAMPLE_BYTES);
        let tail_at = bytes::sub(tail_at, bytes::rem(tail_at, 512)?)?;
        let tail = read_vec(storage, tail_at, bytes::index(bytes::sub(len, tail_at)?)?).await?;
        Ok(Ends { len, head, tail, tail_at })
    }

    /// The copy at the start, whatever it is.
    pub(crate) fn copy(&self) -> Option<Footer> {
        Footer::read(&self.head)
    }

    /// The footer of `size` bytes at the end.
    pub(crate) fn last(&self, size: u64) -> Option<Footer> {
        let at = self.len.checked_sub(size)?.checked_sub(self.tail_at)?;
        Footer::read(self.tail.get(bytes::index(at).ok()?..)?)
    }

    /// The footer that counts: the last 512 bytes, the last 511, the copy at the start.
    pub(crate) fn footer(&self) -> Result<Found> {
        let copy = self.copy();
        for size in [FOOTER_BYTES, OLD_FOOTER_BYTES] {
            let Some(footer) = self.last(size).filter(Footer::is_sound) else { continue };
            let at = bytes::sub(self.len, size)?;
            let mut warnings = Vec::new();
            if size == OLD_FOOTER_BYTES {
                warnings.push("the footer has 511 bytes, as Virtual PC before 2004 wrote it".to_owned());
            }
            let sparse = footer.disk_type() != Some(DiskType::Fixed);
            if sparse && copy.is_none_or(|copy| copy.as_bytes() != footer.as_bytes()) {
                warnings.push("the footer and its copy at the start differ; the footer counts".to_owned());
            }
            return Ok(Found { footer, at, data_end: at, torn: None, warnings });
        }
        match copy {
            Some(footer) if footer.is_sound() && footer.disk_type() != Some(DiskType::Fixed) => {
                let torn =
                    "the footer at the end of the file is missing or damaged; the copy at the start is used";
                Ok(Found {
                    footer,
                    at: 0,
                    data_end: self.len,
                    torn: Some(torn.to_owned()),
                    warnings: vec![format!(
                        "{torn}. Writing to the image writes the footer anew, and so does `vellum repair`"
                    )],
                })
            }
            copy => Err(self.no_footer(copy)),
        }
    }

    fn no_footer(&self, copy: Option<Footer>) -> Error {
        let end = self.len.saturating_sub(FOOTER_BYTES);
        let tails = [(self.last(FOOTER_BYTES), end), (self.last(OLD_FOOTER_BYTES), end.saturating_add(1))];
        let marked = tails.into_iter().chain([(copy, 0)]);
        let marked = marked.filter_map(|(footer, at)| Some((footer?, at))).find(|(f, _)| f.has_cookie());
        match marked {
            Some((footer, at)) if !footer.is_sound() => {
                bad(Code::Checksum, "checksum", at.saturating_add(64), "the checksum of the footer is wrong")
                    .found(format!("{:#010x}", footer.checksum.get()))
                    .allowed(format!("{:#010x}", footer.right_checksum()))
            }
            Some(_) => bad(Code::BadMagic, "cookie", end, "the footer at the end of the file is missing")
                .found("the footer of a fixed image at the start")
                .allowed("conectix in the last 512 bytes"),
            None => bad(Code::BadMagic, "cookie", end, "this is not a VHD image")
                .allowed("conectix in the last 512 bytes, or at the start")
                .hint("let the format be recognised: leave -f out"),
        }
    }
}

/// Opens an image: three reads of 4 KiB at most, and the names of the parent.
///
/// # Errors
/// `TRUNCATED`, `BAD_MAGIC`, `CHECKSUM`, `VERSION`, `RANGE`, `MISALIGNED`, `OVERLAP`, `OUT_OF_FILE`, `SIZE_LIE`,
/// `NUL_IN_NAME`, and those of the storage.
pub(crate) async fn open(request: OpenRequest) -> Result<VhdImage> {
    let image = open_checked(&request).await.map_err(|e| e.image(&request.location))?;
    Ok(image)
}

async fn open_checked(request: &OpenRequest) -> Result<VhdImage> {
    check_request(request)?;
    let ends = Ends::read(request.storage.as_ref()).await?;
    let found = ends.footer()?;
    let disk_type = header::check_footer(&found.footer, found.at)?;
    let mut info = describe(request, &found, disk_type);
    let storages = [request.storage.clone()];
    let copy_is_sound = ends.copy().is_some_and(|copy| copy.is_sound());
    if disk_type == DiskType::Fixed {
        check_fixed(&info, &found)?;
        report(request, &mut info);
        let writing = request.write.then(|| Writing::new(request, found.footer, copy_is_sound));
        return Ok(VhdImage { info, storages, tables: None, writing });
    }
    let at = found.footer.data_offset.get();
    let dynamic = read_dynamic(request.storage.as_ref(), &ends, &found, at).await?;
    info.block_size = dynamic.block_size.get().into();
    check_capacity(&info, &dynamic, at)?;
    describe_dynamic(request, &ends, &dynamic, at, disk_type, &mut info).await?;
    report(request, &mut info);
    let layout = layout(&ends, &found, &dynamic, info.virtual_size, disk_type);
    let (mut data_end, mut writing) = (found.data_end, None);
    if request.write {
        check_can_grow(request)?;
        let placed_max = bytes::index(request.limits.table_bytes / 8)?;
        let survey = Survey::read(request.storage.as_ref(), &layout, data_end, placed_max).await?;
        data_end = found.footer_at(ends.len, survey.end)?;
        let state = Writing::new(request, found.footer, copy_is_sound);
        state.look_at(survey, &layout, data_end)?;
        writing = Some(state);
    }
    let tables = Some(Tables::new(request, layout, data_end));
    Ok(VhdImage { info, storages, tables, writing })
}

/// What the caller asks for, before anything is read.
fn check_request(request: &OpenRequest) -> Result<()> {
    if let Some(snapshot) = &request.snapshot {
        return Err(Error::new(Code::Feature, "VHD images have no internal snapshots")
            .format(FORMAT)
            .found(snapshot)
            .hint("snapshots of a VHD disk are files of their own (differencing images): name one of them"));
    }
    if request.write && request.storage.limits().read_only {
        return Err(read_only(&request.location.0));
    }
    Ok(())
}

fn check_can_grow(request: &OpenRequest) -> Result<()> {
    if request.storage.limits().resizable {
        return Ok(());
    }
    Err(Error::new(Code::Usage, "a growing VHD image needs a file that can get longer")
        .hint("open it for reading, or copy it to a file"))
}

/// What the dynamic header says, as information.
async fn describe_dynamic(
    request: &OpenRequest,
    ends: &Ends,
    dynamic: &DynamicHeader,
    at: u64,
    disk_type: DiskType,
    info: &mut ImageInfo,
) -> Result<()> {
    info.property("tableOffset", dynamic.table_offset.get());
    info.property("maxTableEntries", dynamic.max_table_entries.get());
    info.property("blockSize", dynamic.block_size.get());
    if disk_type == DiskType::Differencing {
        info.property("parentUniqueId", Uuid(dynamic.parent_unique_id).to_string());
        info.property("parentTimestamp", unix_time(dynamic.parent_timestamp.get()));
        let hints = locator::hints(request.storage.as_ref(), ends.len, dynamic, at, info).await?;
        let expected = Identity { uuid: Some(Uuid(dynamic.parent_unique_id)), ..Identity::default() };
        let stamp = dynamic.parent_timestamp.get();
        let modified_unix = (stamp != 0).then(|| unix_time(stamp));
        info.parent = Some(ParentRef { hints, format: None, expected, modified_unix });
    }
    Ok(())
}

/// Where things lie.
pub(crate) fn layout(
    ends: &Ends,
    found: &Found,
    dynamic: &DynamicHeader,
    virtual_size: u64,
    disk_type: DiskType,
) -> Sparse {
    Sparse {
        table_offset: dynamic.table_offset.get(),
        table_bytes: dynamic.table_bytes(),
        header_at: found.footer.data_offset.get(),
        block: dynamic.block_size.get().into(),
        bitmap_bytes: dynamic.bitmap_bytes(),
        virtual_size,
        file_len: ends.len,
        differencing: disk_type == DiskType::Differencing,
        locators: locator::places(dynamic, ends.len),
    }
}

/// Reads the dynamic header, from the head of the file if it is there.
pub(crate) async fn read_dynamic(
    storage: &dyn Storage,
    ends: &Ends,
    found: &Found,
    at: u64,
) -> Result<header::DynamicHeader> {
    let field_at = found.at.saturating_add(16);
    let about = |code, message: &str| bad(code, "dataOffset", field_at, message).found(format!("{at:#x}"));
    if at < FOOTER_BYTES {
        return Err(
            about(Code::Overlap, "the dynamic header lies in the footer's copy").allowed("0x200 and more")
        );
    }
    let end = at.saturating_add(DYNAMIC_BYTES);
    if end > ends.len {
        return Err(about(Code::OutOfFile, "the dynamic header lies past the end of the file")
            .allowed(format!("up to {}", ends.len.saturating_sub(DYNAMIC_BYTES))));
    }
    let (from, to) = (bytes::index(at)?, bytes::index(end)?);
    if let Some(raw) = ends.head.get(from..to) {
        return header::parse_dynamic(raw, at, ends.len);
    }
    let len = bytes::index(DYNAMIC_BYTES)?;
    let raw = read_vec(storage, at, len).await?;
    header::parse_dynamic(&raw, at, ends.len)
}

/// The disk of a fixed image lies before its footer.
fn check_fixed(info: &ImageInfo, found: &Found) -> Result<()> {
    if info.virtual_size > found.data_end {
        let field_at = found.at.saturating_add(48);
        return Err(bad(Code::SizeLie, "currentSize", field_at, "the disk is larger than the file")
            .found(info.virtual_size)
            .allowed(format!("up to {}, where the footer starts", found.data_end)));
    }
    Ok(())
}

/// The BAT covers the disk.
pub(crate) fn check_capacity(info: &ImageInfo, dynamic: &DynamicHeader, at: u64) -> Result<()> {
    let entries = dynamic.max_table_entries.get();
    let capacity = bytes::mul(entries.into(), info.block_size)?;
    if capacity < info.virtual_size {
        return Err(bad(
            Code::SizeLie,
            "maxTableEntries",
            at.saturating_add(28),
            "the BAT does not cover the disk",
        )
        .found(format!("{entries} blocks of {} bytes", info.block_size))
        .allowed(format!("enough for {} bytes", info.virtual_size))
        .hint("the end of the disk cannot be read from this image; restore a backup"));
    }
    Ok(())
}

/// The size of the disk (section 11), and what is to be said about it.
///
/// Virtual PC and QEMU (by its tag `qemu`) mean the geometry; everybody else means `currentSize`. QEMU 10.0.2 was seen
/// to do the same for every tag.
pub(crate) fn disk_size(footer: &Footer) -> (u64, Option<String>) {
    let current = footer.current_size.get();
    let chs = footer.chs();
    let by_geometry = matches!(&footer.creator_app, b"vpc " | b"qemu") && chs != CHS_MAX;
    if !by_geometry {
        return (current, None);
    }
    let sectors =
        u64::from(chs.cylinders).saturating_mul(chs.heads.into()).saturating_mul(chs.sectors.into());
    let size = sectors.saturating_mul(512);
    let (cylinders, heads, spt) = (chs.cylinders, chs.heads, chs.sectors);
    match size {
        _ if size == current => (size, None),
        0 => (current, Some(format!("the geometry {cylinders}/{heads}/{spt} is empty; currentSize counts"))),
        _ => {
            let what = format!(
                "the geometry {cylinders}/{heads}/{spt} gives {size} bytes, currentSize {current}; for images of \
                 this creator the geometry counts"
            );
            (size, Some(what))
        }
    }
}

pub(crate) fn unix_time(timestamp: u32) -> u64 {
    u64::from(timestamp).saturating_add(EPOCH)
}

/// Four letters.
fn tag(letters: [u8; 4]) -> Value {
    Value::Text(String::from_utf8_lossy(&letters).trim_end_matches(['\0', ' ']).to_owned())
}

/// What the footer says.
fn describe(request: &OpenRequest, found: &Found, disk_type: DiskType) -> ImageInfo {
    let footer = &found.footer;
    let (virtual_size, size_warning) = disk_size(footer);
    let chs = footer.chs();
    let mut info = ImageInfo {
        format: FORMAT,
        variant: disk_type.name().to_owned(),
        name: request.location.0.clone(),
        virtual_size,
        identity: Identity { uuid: Some(Uuid(footer.unique_id)), ..Identity::default() },
        modified_unix: Some(unix_time(footer.timestamp.get())),
        pchs: (chs.cylinders != 0 && chs.heads != 0 && chs.sectors != 0).then_some(chs),
        dirty: found.torn.clone(),
        ..ImageInfo::default()
    };
    let version = footer.version.get();
    let creator_version = footer.creator_version.get();
    info.property("features", footer.features.get());
    info.property("temporary", footer.features.get() & 1 != 0);
    info.property("version", format!("{}.{}", version >> 16, version & 0xffff));
    info.property("dataOffset", footer.data_offset.get());
    info.property("timestamp", unix_time(footer.timestamp.get()));
    info.property("creatorApp", tag(footer.creator_app));
    info.property("creatorVersion", format!("{}.{}", creator_version >> 16, creator_version & 0xffff));
    info.property("creatorHost", tag(footer.creator_host));
    info.property("originalSize", Value::Bytes(footer.original_size.get()));
    info.property("currentSize", Value::Bytes(footer.current_size.get()));
    info.property("uniqueId", Uuid(footer.unique_id).to_string());
    info.property("savedState", footer.saved_state != 0);
    info.warnings.clone_from(&found.warnings);
    info.warnings.extend(size_warning);
    if footer.saved_state != 0 {
        info.warnings.push("a saved state of a virtual machine refers to the disk".to_owned());
    }
    info
}

/// Names the image in the warnings and sends them.
fn report(request: &OpenRequest, info: &mut ImageInfo) {
    for warning in &mut info.warnings {
        *warning = format!("{}: {warning}", request.location);
        request.events.warn(warning);
    }
}
