//! Opening: the header is read and checked, everything in it becomes information; the map stays on disk.

use crate::header::{self, FORMAT, Header, VERSION_1_1};
use crate::map::VdiImage;
use vellum_core::storage::read_vec;
use vellum_core::{
    Buf, Code, Error, Identity, ImageInfo, OpenRequest, ParentRef, Result, Storage, Uuid, bytes,
};

/// Bytes read at the start of the file: the header, rounded up to what any storage can read.
const HEAD_BYTES: u64 = 4096;

/// Opens an image: one read of 4 KiB.
///
/// # Errors
/// Those of [`header::parse`], and of the storage.
pub(crate) async fn open(request: OpenRequest) -> Result<VdiImage> {
    let file_len = request.storage.len()?;
    let head = read_head(request.storage.as_ref(), file_len).await?;
    let header = header::parse(&head, file_len).map_err(|e| e.image(&request.location))?;
    check_wishes(&request, &header)?;
    let info = describe(&request, &header, file_len)?;
    for warning in &info.warnings {
        request.events.warn(warning);
    }
    VdiImage::new(request, info, &header, file_len)
}

/// The first bytes of the file.
pub(crate) async fn read_head(storage: &dyn Storage, file_len: u64) -> Result<Buf> {
    read_vec(storage, 0, bytes::index(file_len.min(HEAD_BYTES))?).await
}

/// What is asked for that the image cannot do.
fn check_wishes(request: &OpenRequest, header: &Header) -> Result<()> {
    let refused = |code, what: &str| Error::new(code, what).image(&request.location).format(FORMAT);
    if let Some(name) = &request.snapshot {
        return Err(refused(Code::Usage, "VDI images have no snapshots inside")
            .found(format!("snapshot {name:?}"))
            .hint("VirtualBox's snapshots are images of their own (differencing images): open one of them"));
    }
    if request.write && header.version != VERSION_1_1 {
        return Err(refused(Code::Feature, "images of this version can be read only")
            .field("version")
            .at(0x44)
            .found(format!("{}.{}", header.version >> 16, header.version & 0xffff))
            .allowed("1.1")
            .hint("convert the image to a new one, and write to that"));
    }
    Ok(())
}

/// A UUID, if it is one.
fn present(uuid: Uuid) -> Option<Uuid> {
    (!uuid.is_nil()).then_some(uuid)
}

/// What the header says.
fn describe(request: &OpenRequest, header: &Header, file_len: u64) -> Result<ImageInfo> {
    let mut info = ImageInfo {
        format: FORMAT,
        variant: header.image_type.name().to_owned(),
        name: request.location.0.clone(),
        virtual_size: virtual_size(header)?,
        block_size: header.cb_block.into(),
        identity: Identity {
            uuid: present(header.uuid_create),
            modification: present(header.uuid_modify),
            cid: None,
        },
        comment: header.comment.clone(),
        pchs: header.pchs,
        lchs: header.lchs,
        ..ImageInfo::default()
    };
    if header.has_parent() {
        let expected = Identity {
            uuid: Some(header.uuid_linkage),
            modification: present(header.uuid_parent_modify),
            cid: None,
        };
        info.parent = Some(ParentRef { expected, ..ParentRef::default() });
    }
    properties(&mut info, header);
    info.warnings = oddities(header);
    let data = bytes::mul(header.c_blocks_allocated.into(), header.stride())?;
    let data_end = bytes::add(header.off_data, data)?;
    if data_end > file_len && header.c_blocks_allocated != 0 {
        info.warnings.push(format!(
            "the file ends at byte {file_len}, before the end of its last block at {data_end}; blocks past the end \
             cannot be read"
        ));
    }
    info.warnings.iter_mut().for_each(|what| *what = format!("{}: {what}", request.location));
    Ok(info)
}

fn properties(info: &mut ImageInfo, header: &Header) {
    let version = format!("{}.{}", header.version >> 16, header.version & 0xffff);
    info.property("text", header.text.trim_end());
    info.property("version", version);
    if header.cb_header != 0 {
        info.property("cbHeader", header.cb_header);
    }
    info.property("flags", header.flags);
    info.property("offBlocks", header.off_blocks);
    info.property("offData", header.off_data);
    info.property("sector size", header.sector_size);
    info.property("cbDisk", header.cb_disk);
    info.property("cbBlock", header.cb_block);
    info.property("cbBlockExtra", header.cb_block_extra);
    info.property("cBlocks", header.c_blocks);
    info.property("cBlocksAllocated", header.c_blocks_allocated);
    info.property("uuidCreate", header.uuid_create.to_string());
    info.property("uuidModify", header.uuid_modify.to_string());
    info.property("uuidLinkage", header.uuid_linkage.to_string());
    info.property("uuidParentModify", header.uuid_parent_modify.to_string());
}

/// Size of the disk: VirtualBox rounds down to whole sectors (QEMU rounds up); the writers of odd sizes were VirtualBox's.
pub(crate) fn virtual_size(header: &Header) -> Result<u64> {
    bytes::sub(header.cb_disk, bytes::rem(header.cb_disk, 512)?)
}

/// What is odd but harmless to reading and writing.
pub(crate) fn oddities(header: &Header) -> Vec<String> {
    let mut odd = Vec::new();
    if let Ok(size) = virtual_size(header)
        && size != header.cb_disk
    {
        odd.push(format!(
            "cbDisk = {} is not a multiple of 512; the disk is taken as {size} bytes, as VirtualBox does",
            header.cb_disk
        ));
    }
    if header.cb_disk == 0 {
        odd.push("the disk has no byte; VirtualBox refuses such images".to_owned());
    }
    if header.uuid_create.is_nil() || header.uuid_modify.is_nil() {
        odd.push("uuidCreate or uuidModify is null; VirtualBox refuses such images".to_owned());
    }
    if header.sector_size != 512 {
        odd.push(format!("sector size is {}, not 512; QEMU refuses such images", header.sector_size));
    }
    if header.uuid_linkage.is_nil() && !header.uuid_parent_modify.is_nil() {
        odd.push("uuidParentModify is set although the image names no parent; it is ignored".to_owned());
    }
    odd
}
