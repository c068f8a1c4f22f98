//! The image that a workload begins with: an empty unit, a full one, and one with a few sectors.

use super::cases::{Case, Parent};
use super::view::{Marks, View, marks, view};
use std::sync::{Arc, OnceLock};
use vellum::{
    Access, Asker, Buf, ChainOptions, CreateRequest, Disk, DiskOptions, DiskTraits, Format, FormatRegistry,
    ImageWriter, Location, OpenFlags, OptionValues, Output, OutputMode, ParentLink, Payload, Providers,
    Result, Storage, WriteAccess, WriteFlags, block_on, write_all,
};
use vellum_sim::{Content, FileId, FileSet, SECTOR, SimFiles, Tag, hash_of, sector_bytes};

/// Name of the image under test.
pub const DISK: &str = "disk.img";
/// Name of its parent.
pub const PARENT: &str = "parent.img";
/// Name of the parent's parent.
pub const GRANDPARENT: &str = "grandparent.img";

/// What a workload begins with.
pub struct Start {
    /// The files.
    pub files: FileSet,
    /// What the guest sees.
    pub disk: Content,
    /// The same, as hashes of sectors, and the marks of the image.
    pub seen: (View, Marks),
    /// Files that must never change.
    pub parents: Vec<FileId>,
}

/// All formats.
pub fn formats() -> &'static FormatRegistry {
    static FORMATS: OnceLock<FormatRegistry> = OnceLock::new();
    FORMATS.get_or_init(|| FormatRegistry::new(vellum::formats()))
}

/// Opens the image under test with its parents.
pub fn open(files: &Arc<SimFiles>, case: &Case, write: bool, flags: OpenFlags) -> Result<Disk> {
    open_state(files, case, write, flags, None)
}

/// Opens the state of an internal snapshot, or the present one.
pub fn open_state(
    files: &Arc<SimFiles>,
    case: &Case,
    write: bool,
    flags: OpenFlags,
    snapshot: Option<String>,
) -> Result<Disk> {
    // Each state has a time and randomness of its own: no session takes the identity of another.
    let seed = if write { files.snapshot().hash() } else { 0 };
    let options = ChainOptions {
        // Everything else must be recognisable whatever a crash leaves.
        format: (case.format == "raw").then(|| "raw".to_owned()),
        write: if write { WriteAccess::Yes } else { WriteAccess::No },
        providers: Some(Providers::seeded(u128::from(seed) << 32, 1_700_000_100 + seed % 1_000_000)),
        disk: DiskOptions { flags, ..DiskOptions::default() },
        snapshot,
        ..ChainOptions::default()
    };
    block_on(formats().open_chain(&files.resolver(), DISK, &options)).map(|(disk, _)| disk)
}

/// How the tests use a disk, if a workload does not say otherwise.
pub fn usual_flags() -> OpenFlags {
    OpenFlags { discard: true, ..OpenFlags::default() }
}

/// Makes the image of a case.
pub fn start(case: &Case) -> Result<Start> {
    let files = SimFiles::new(FileSet::default());
    let mut link = None;
    let parents = [(GRANDPARENT, &case.grandparent, Tag::GRANDPARENT), (PARENT, &case.parent, Tag::PARENT)];
    for (name, parent, tag) in parents {
        let Some(parent) = parent else { continue };
        let content = content(case, case.parent_size(parent), tag);
        make(&files, name, parent_case(case, parent), &content, link)?;
        link = Some(link_to(&files, name, case, parent)?);
    }
    let parents: Vec<FileId> = files.snapshot().names.values().copied().collect();
    make(&files, DISK, *case, &content(case, case.size(), Tag::START), link)?;
    add_sectors(&files, case)?;
    let disk = open(&files, case, false, usual_flags())?;
    assert_eq!(disk.size(), case.size(), "{}: the disk has another size", case.name);
    let seen = (view(&disk)?, marks(&disk));
    Ok(Start { files: files.snapshot(), disk: super::view::content(&disk)?, seen, parents })
}

/// Data of a new image: unit 1 and unit 4; in a parent, unit 0, too, and a few sectors of unit 2; in the parent's parent
/// units 1, 2 and 5, of which each of the others hides a part.
fn content(case: &Case, size: u64, write: u64) -> Content {
    let mut content = Content::default();
    content.set_len(size);
    let mut put = |from: u64, to: u64| {
        for sector in from / SECTOR..to.min(size) / SECTOR {
            content.write(&sector_bytes(sector, write), sector * SECTOR);
        }
    };
    // Large units are filled at both ends only: what lies between costs time and shows nothing more.
    let edge = case.block.min(16 << 10);
    let is_parent = write == Tag::PARENT;
    let units: &[u64] = match write {
        Tag::GRANDPARENT => &[1, 2, 5],
        Tag::PARENT => &[0, 1, 3],
        _ => &[1, 4],
    };
    for unit in units {
        put(unit * case.block, unit * case.block + edge);
        put((unit + 1) * case.block - edge, (unit + 1) * case.block);
    }
    if is_parent {
        put(2 * case.block + case.block / 2, 2 * case.block + case.block / 2 + SECTOR);
    }
    content.cut();
    content
}

/// Gives unit 2 and the last unit a few sectors, as a guest would.
fn add_sectors(files: &Arc<SimFiles>, case: &Case) -> Result<()> {
    if case.compressed {
        return Ok(());
    }
    let disk = open(files, case, true, usual_flags())?;
    let last = case.size() / SECTOR - 1;
    let unit = 2 * case.block / SECTOR;
    for sector in [unit, unit + case.block / SECTOR - 1, last] {
        let buf = Buf::copy_of(&sector_bytes(sector, Tag::START));
        disk.write(buf, sector * SECTOR, WriteFlags::default()).wait().1?;
    }
    disk.flush_all().wait()?;
    disk.close().wait()
}

fn parent_case(case: &Case, parent: &Parent) -> Case {
    Case { format: parent.format, options: parent.options, compressed: false, ..*case }
}

fn link_to(files: &Arc<SimFiles>, name: &str, case: &Case, parent: &Parent) -> Result<ParentLink> {
    let options = ChainOptions { format: Some(parent.format.to_owned()), ..ChainOptions::default() };
    let image = block_on(formats().open_alone(&files.resolver(), name, &options))?;
    Ok(ParentLink {
        place: name.to_owned(),
        absolute: format!("/sim/{name}"),
        format: image.format.name(),
        virtual_size: case.parent_size(parent),
        identity: image.layer.image.info().identity,
        modified_unix: None,
    })
}

fn make(
    files: &Arc<SimFiles>,
    name: &str,
    case: Case,
    content: &Content,
    parent: Option<ParentLink>,
) -> Result<()> {
    let format: Arc<dyn Format> = formats().by_name(case.format)?;
    let output = Output::new(files.resolver(), Location(name.to_owned()), OutputMode::Fresh);
    let given = case.options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    let request = CreateRequest {
        output: output.clone(),
        virtual_size: content.len(),
        options: OptionValues::check(format.name(), format.create_options(), given)?,
        traits: DiskTraits::default(),
        compress: case.compressed,
        level: None,
        providers: Providers::seeded(hash_of(name.as_bytes()).into(), 1_700_000_000),
        parent,
    };
    block_on(async {
        let mut writer = format.create(request).await?;
        feed(writer.as_mut(), content).await?;
        writer.finish().await?;
        output.put_in_place().await
    })
}

async fn feed(writer: &mut dyn ImageWriter, content: &Content) -> Result<()> {
    let shape = writer.shape().clone();
    let mut encoded = Vec::new();
    for block in 0..content.len().div_ceil(shape.block_size) {
        let mut data = vec![0u8; shape.block_size as usize];
        content.read(&mut data, block * shape.block_size);
        if vellum::bytes::is_zero(&data) {
            continue;
        }
        let fits = match &shape.codec {
            Some(codec) => codec.encode(&data, &mut encoded, shape.encoded_limit)?,
            None => false,
        };
        let payload = if fits { Payload::Encoded { len: encoded.len() } } else { Payload::Data };
        let mut writes = Vec::new();
        let place = writer.place(block, payload, &mut writes)?;
        let len = shape.block_size.min(content.len() - block * shape.block_size) as usize;
        let source = if fits { &encoded[..] } else { &data[..len] };
        let storage = writer.storages()[place.storage].clone();
        storage.write_at(Buf::copy_of(source), place.offset, WriteFlags::default()).await.1?;
        write_all(writer.storages(), writes).await?;
    }
    Ok(())
}

/// The storage of the image under test, for checking it.
pub fn storage(files: &Arc<SimFiles>) -> Result<Arc<dyn Storage>> {
    block_on(files.resolver().open(DISK, &Asker::User, Access::default())).map(|opened| opened.storage)
}
