//! Writing new images. Header and L1 stand in front; everything else in the order in which it is needed.

use crate::backing::Backing;
use crate::extensions;
use crate::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, COMPRESSION_ZLIB, COMPRESSION_ZSTD, INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE, INCOMPAT_EXTENDED_L2, MAGIC, RawHeader, V2_LEN, V3_LEN,
};
use crate::refcount::{self, Allocator, RefcountTable};
use std::sync::Arc;
use vellum_core::{
    BoxFuture, Code, CreateRequest, Error, ImageWriter, MetaWrite, OptionKind, OptionSpec, Payload, Place,
    Preallocate, Result, Storage, TableWriter, WriterShape, bytes, set_len, write_all,
};
use zerocopy::IntoBytes;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// All 32 subclusters allocated, none zero.
const ALL_SUBCLUSTERS: u64 = 0xffff_ffff;
const L1_BYTES_MAX: u64 = 32 << 20;

/// The options that `create` takes.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    option("compat", OptionKind::OneOf(&["v3", "v2", "1.1", "0.10"]), "v3", "version of the format"),
    option(
        "cluster_size",
        OptionKind::Size { min: 512, max: 2 << 20 },
        "65536",
        "allocation unit, a power of two",
    ),
    option(
        "compression_type",
        OptionKind::OneOf(&["zlib", "deflate", "zstd"]),
        "zlib",
        "how clusters are compressed",
    ),
    option(
        "preallocation",
        OptionKind::OneOf(&["off", "metadata", "falloc", "full"]),
        "off",
        "allocate all clusters; falloc and full reserve their space, too, full by writing zeros",
    ),
    expert("extended_l2", OptionKind::Flag, "off", "32 subclusters for each cluster (of 16 KiB or more)"),
    expert(
        "refcount_bits",
        OptionKind::Number { min: 1, max: 64 },
        "16",
        "width of a refcount: 1, 2, 4, ... 64",
    ),
    expert("lazy_refcounts", OptionKind::Flag, "off", "refcount updates may be postponed"),
    expert("data_file", OptionKind::Text, "", "keep guest data in this file of the same directory"),
    expert("data_file_raw", OptionKind::Flag, "off", "the data file is a valid raw image by itself"),
];

const fn option(
    name: &'static str,
    kind: OptionKind,
    default: &'static str,
    help: &'static str,
) -> OptionSpec {
    OptionSpec { name, kind, default, expert: false, help }
}

const fn expert(
    name: &'static str,
    kind: OptionKind,
    default: &'static str,
    help: &'static str,
) -> OptionSpec {
    OptionSpec { name, kind, default, expert: true, help }
}

/// What the image is to be, decided from the options.
struct Design {
    version: u32,
    size: u64,
    cluster: u64,
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    zstd: bool,
    lazy_refcounts: bool,
    data_file: Option<String>,
    data_file_raw: bool,
    /// Every cluster gets its place, used or not.
    dense: bool,
    preallocate: Preallocate,
    backing: Option<Backing>,
}

fn refuse(what: &str, hint: &str) -> Error {
    Error::new(Code::Usage, what).format("qcow2").hint(hint)
}

impl Design {
    fn new(request: &CreateRequest) -> Result<Self> {
        let o = &request.options;
        let cluster = o.number("cluster_size", 65536);
        if !cluster.is_power_of_two() {
            return Err(
                refuse("the cluster size must be a power of two", "try cluster_size=64k").found(cluster)
            );
        }
        let bits = o.number("refcount_bits", 16);
        if !bits.is_power_of_two() {
            return Err(refuse("refcount_bits must be a power of two", "the usual value is 16").found(bits));
        }
        let preallocation = o.text("preallocation", "off");
        let data_file_raw = o.flag("data_file_raw", false);
        let design = Design {
            version: if matches!(o.text("compat", "v3"), "v2" | "0.10") { 2 } else { 3 },
            size: bytes::align_up(request.virtual_size, 512)?,
            cluster,
            cluster_bits: cluster.trailing_zeros(),
            refcount_order: bits.trailing_zeros(),
            extended_l2: o.flag("extended_l2", false),
            zstd: o.text("compression_type", "zlib") == "zstd",
            lazy_refcounts: o.flag("lazy_refcounts", false),
            data_file: o.given("data_file").filter(|name| !name.is_empty()).map(str::to_owned),
            data_file_raw,
            dense: preallocation != "off" || data_file_raw,
            preallocate: match preallocation {
                "falloc" => Preallocate::Falloc,
                "full" => Preallocate::Full,
                _ => Preallocate::Off,
            },
            backing: request.parent.as_ref().map(Backing::new).transpose()?,
        };
        design.check(request.compress)?;
        Ok(design)
    }

    fn check(&self, compress: bool) -> Result<()> {
        let needs_v3 = [
            (self.extended_l2, "extended_l2"),
            (self.zstd, "compression_type=zstd"),
            (self.lazy_refcounts, "lazy_refcounts"),
            (self.data_file.is_some(), "data_file"),
            (self.refcount_order != 4, "refcount_bits other than 16"),
        ];
        if self.version == 2
            && let Some((_, name)) = needs_v3.iter().find(|(wanted, _)| *wanted)
        {
            return Err(refuse(
                &format!("{name} needs version 3 of the format"),
                "leave out compat, or set compat=v3",
            ));
        }
        if self.extended_l2 && self.cluster < 16 << 10 {
            return Err(refuse(
                "extended_l2 needs clusters of 16 KiB or more",
                "set cluster_size=16k or more",
            ));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(refuse("data_file_raw needs data_file", "name the data file with data_file=NAME"));
        }
        if self.data_file.is_some() && compress {
            return Err(refuse(
                "an image with a data file cannot be compressed",
                "leave out data_file or --compress",
            ));
        }
        if self.dense && compress {
            return Err(refuse(
                "a preallocated image cannot be compressed",
                "leave out preallocation or --compress",
            ));
        }
        if self.backing.is_some() && self.dense {
            return Err(refuse(
                "a child whose clusters are all allocated would hide its parent",
                "leave out preallocation or data_file_raw, or the parent",
            ));
        }
        if let Some(name) = &self.data_file
            && (name.contains(['/', '\\', '\0']) || name == "." || name == "..")
        {
            return Err(refuse(
                "data_file must be a plain file name",
                "the data file stands beside the image",
            )
            .found(name));
        }
        Ok(())
    }

    fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    fn l2_entries(&self) -> Result<u64> {
        bytes::div(self.cluster, self.l2_entry_bytes())
    }

    fn l1_entries(&self) -> Result<u64> {
        let entries = bytes::div_ceil(self.size, bytes::mul(self.cluster, self.l2_entries()?)?)?.max(1);
        if entries > L1_BYTES_MAX / 8 {
            return Err(Error::new(Code::TableLimit, "the disk is too large for clusters of this size")
                .format("qcow2")
                .found(format!("{} bytes of disk, {} bytes a cluster", self.size, self.cluster))
                .allowed(format!("an L1 table of up to {L1_BYTES_MAX} bytes"))
                .hint("choose a larger cluster_size"));
        }
        Ok(entries)
    }

    fn clusters(&self) -> Result<u64> {
        bytes::div_ceil(self.size, self.cluster)
    }

    /// Bytes of the finished image file, if every cluster gets its place.
    fn dense_file_len(&self) -> Result<u64> {
        let data = if self.data_file.is_some() { 0 } else { self.clusters()? };
        let l1 = bytes::div_ceil(bytes::mul(self.l1_entries()?, 8)?, self.cluster)?;
        let l2 = bytes::div_ceil(self.clusters()?, self.l2_entries()?)?;
        let header = 1u64;
        let counted = bytes::add(bytes::add(header, l1)?, bytes::add(l2, data)?)?;
        bytes::mul(refcount::with_refcounts(counted, self.cluster, self.refcount_order)?, self.cluster)
    }
}

pub(crate) async fn create(request: CreateRequest) -> Result<Box<dyn ImageWriter>> {
    let design = Design::new(&request)?;
    let l1_entries = design.l1_entries()?;
    let codec = match (request.compress, design.zstd) {
        (false, _) => None,
        (true, true) => Some(vellum_codec::zstd(request.level)?),
        (true, false) => Some(vellum_codec::deflate(request.level)?),
    };
    let mut storages = vec![request.output.main().await?];
    if let Some(name) = &design.data_file {
        if *name == request.output.file_name() {
            return Err(refuse("the image cannot be its own data file", "choose another data_file"));
        }
        storages.push(request.output.sibling(name).await?);
    }
    let mut writes = Vec::new();
    let mut space = Allocator::new(design.cluster, design.refcount_order)?;
    space.clusters(design.cluster, &mut writes)?;
    let l1_offset = space.clusters(bytes::mul(l1_entries, 8)?, &mut writes)?;
    write_all(&storages, writes).await?;
    if design.preallocate != Preallocate::Off {
        // Before anything is written: only what a file gains by growing can be reserved, and a host that has no room
        // says so at once. (With a data file, that is where the guest's data goes.)
        let lens = [design.dense_file_len()?, design.size];
        for (storage, len) in storages.iter().zip(lens) {
            set_len(storage.as_ref(), len, design.preallocate).await?;
        }
    }
    let shape = WriterShape {
        block_size: design.cluster,
        codec,
        encoded_limit: bytes::index(bytes::sub(design.cluster, 1)?)?,
    };
    let l1 = TableWriter::new(0, l1_offset, l1_entries, 8, 0);
    Ok(Box::new(Writer {
        design,
        storages,
        shape,
        space,
        l1,
        l1_offset,
        l1_entries,
        l2: None,
        last: None,
        filled: 0,
    }))
}

struct Writer {
    design: Design,
    storages: Vec<Arc<dyn Storage>>,
    shape: WriterShape,
    space: Allocator,
    l1: TableWriter,
    l1_offset: u64,
    l1_entries: u64,
    l2: Option<L2>,
    last: Option<(u64, Place)>,
    /// Dense images: clusters below this have their place.
    filled: u64,
}

/// The L2 table in progress.
struct L2 {
    index: u64,
    offset: u64,
    table: Vec<u8>,
}

impl Writer {
    /// Makes the table number `index` the one in progress.
    fn enter_l2(&mut self, index: u64, writes: &mut Vec<MetaWrite>) -> Result<()> {
        if self.l2.as_ref().is_some_and(|l2| l2.index == index) {
            return Ok(());
        }
        self.leave_l2(writes);
        let offset = self.space.clusters(self.design.cluster, writes)?;
        self.l1.set(index, &(offset | COPIED).to_be_bytes(), writes)?;
        let table = vec![0u8; bytes::index(self.design.cluster)?];
        self.l2 = Some(L2 { index, offset, table });
        Ok(())
    }

    fn leave_l2(&mut self, writes: &mut Vec<MetaWrite>) {
        if let Some(l2) = self.l2.take() {
            writes.push(MetaWrite { storage: 0, offset: l2.offset, bytes: l2.table });
        }
    }

    fn set_entry(&mut self, block: u64, entry: u64, bitmap: u64) -> Result<()> {
        let within = bytes::mul(bytes::rem(block, self.design.l2_entries()?)?, self.design.l2_entry_bytes())?;
        let at = bytes::index(within)?;
        let mut value = entry.to_be_bytes().to_vec();
        if self.design.extended_l2 {
            value.extend_from_slice(&bitmap.to_be_bytes());
        }
        let target = self.l2.as_mut().and_then(|l2| l2.table.get_mut(at..at.saturating_add(value.len())));
        let Some(target) = target else {
            return Err(Error::new(Code::Usage, "an L2 entry lies outside its table").found(block));
        };
        target.copy_from_slice(&value);
        Ok(())
    }

    /// Gives `block` a cluster and an entry.
    fn allocate(&mut self, block: u64, payload: Payload, writes: &mut Vec<MetaWrite>) -> Result<Place> {
        self.enter_l2(bytes::div(block, self.design.l2_entries()?)?, writes)?;
        match payload {
            Payload::Encoded { len } => {
                let offset = self.space.packed(bytes::wide(len), writes)?;
                self.set_entry(
                    block,
                    compressed_entry(offset, bytes::wide(len), self.design.cluster_bits)?,
                    0,
                )?;
                Ok(Place { storage: 0, offset })
            }
            Payload::Data if self.design.data_file.is_some() => {
                let offset = bytes::mul(block, self.design.cluster)?;
                self.set_entry(block, offset | COPIED, ALL_SUBCLUSTERS)?;
                Ok(Place { storage: 1, offset })
            }
            Payload::Data => {
                let offset = self.space.clusters(self.design.cluster, writes)?;
                self.set_entry(block, offset | COPIED, ALL_SUBCLUSTERS)?;
                Ok(Place { storage: 0, offset })
            }
        }
    }

    /// Dense images: gives every cluster below `block` its place.
    fn fill_up_to(&mut self, block: u64, writes: &mut Vec<MetaWrite>) -> Result<()> {
        while self.design.dense && self.filled < block {
            self.allocate(self.filled, Payload::Data, writes)?;
            self.filled = self.filled.saturating_add(1);
        }
        Ok(())
    }

    async fn end(mut self: Box<Self>) -> Result<()> {
        let mut writes = Vec::new();
        // In steps, so that the metadata of a dense image is not all held at once.
        let clusters = self.design.clusters()?;
        while self.design.dense && self.filled < clusters {
            let stop = self.filled.saturating_add(1 << 16).min(clusters);
            self.fill_up_to(stop, &mut writes)?;
            write_all(&self.storages, std::mem::take(&mut writes)).await?;
        }
        self.leave_l2(&mut writes);
        self.l1.finish(&mut writes);
        let refcounts = self.space.finish(&mut writes)?;
        write_all(&self.storages, writes).await?;
        for (index, storage) in self.storages.iter().enumerate() {
            let len = if index == 0 { self.space.next() } else { self.design.size };
            set_len(storage.as_ref(), len, Preallocate::Off).await?;
        }
        let header = MetaWrite { storage: 0, offset: 0, bytes: self.header(&refcounts)? };
        write_all(&self.storages, vec![header]).await
    }

    fn header(&self, refcounts: &RefcountTable) -> Result<Vec<u8>> {
        let d = &self.design;
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        let raw = RawHeader {
            magic: MAGIC.into(),
            version: d.version.into(),
            backing_file_offset: 0.into(),
            backing_file_size: 0.into(),
            cluster_bits: d.cluster_bits.into(),
            size: d.size.into(),
            crypt_method: 0.into(),
            l1_size: bytes::narrow(self.l1_entries)?.into(),
            l1_table_offset: self.l1_offset.into(),
            refcount_table_offset: refcounts.offset.into(),
            refcount_table_clusters: refcounts.clusters.into(),
            nb_snapshots: 0.into(),
            snapshots_offset: 0.into(),
            incompatible_features: (flag(d.data_file.is_some(), INCOMPAT_DATA_FILE)
                | flag(d.zstd, INCOMPAT_COMPRESSION)
                | flag(d.extended_l2, INCOMPAT_EXTENDED_L2))
            .into(),
            compatible_features: flag(d.lazy_refcounts, COMPAT_LAZY_REFCOUNTS).into(),
            autoclear_features: flag(d.data_file_raw, AUTOCLEAR_RAW_DATA).into(),
            refcount_order: d.refcount_order.into(),
            header_length: V3_LEN.into(),
            compression_type: if d.zstd { COMPRESSION_ZSTD } else { COMPRESSION_ZLIB },
            padding: [0; 7],
        };
        let len = if d.version == 2 { V2_LEN } else { V3_LEN };
        let mut header: Vec<u8> = raw.as_bytes().iter().copied().take(bytes::index(len.into())?).collect();
        if let Some(name) = &d.data_file {
            extensions::write(extensions::DATA_FILE, name.as_bytes(), &mut header)?;
        }
        if let Some(backing) = &d.backing {
            backing.write_format(&mut header)?;
        }
        let names = feature_names();
        let taken = header.len().saturating_add(d.backing.as_ref().map_or(0, Backing::room));
        // Tiny clusters have no room for names; nothing depends on them.
        if d.version >= 3 && names.len().saturating_add(16).saturating_add(taken) <= bytes::index(d.cluster)?
        {
            extensions::write(extensions::FEATURE_NAMES, &names, &mut header)?;
        }
        header.extend_from_slice(&[0; 8]);
        if let Some(backing) = &d.backing {
            backing.write_name(&mut header)?;
        }
        if bytes::wide(header.len()) > d.cluster {
            return Err(refuse(
                "the names of the parent and of the data file do not fit into the header",
                "choose shorter names or a larger cluster_size",
            ));
        }
        Ok(header)
    }
}

/// Entry of a compressed cluster: `x = 62 - (cluster_bits - 8)` bits of offset, then the sectors after the first.
fn compressed_entry(offset: u64, len: u64, cluster_bits: u32) -> Result<u64> {
    let x = 70u32.saturating_sub(cluster_bits);
    let last = bytes::sub(bytes::add(offset, len)?, 1)? / 512;
    let sectors = bytes::sub(last, offset / 512)?;
    if offset.checked_shr(x).unwrap_or(0) != 0 {
        return Err(Error::new(
            Code::Overflow,
            "the image is too large for compressed clusters of this size",
        )
        .hint("choose a smaller cluster_size"));
    }
    Ok(COMPRESSED | sectors.checked_shl(x).unwrap_or(0) | offset)
}

/// The feature name table, with the names that QEMU's tools print.
fn feature_names() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut table = Vec::new();
    for (kind, bit, name) in NAMES {
        table.extend_from_slice(&[kind, bit]);
        table.extend(name.bytes().chain(std::iter::repeat(0)).take(46));
    }
    table
}

impl ImageWriter for Writer {
    fn shape(&self) -> &WriterShape {
        &self.shape
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn place(&mut self, block: u64, payload: Payload, writes: &mut Vec<MetaWrite>) -> Result<Place> {
        if let Some((last, place)) = self.last
            && last == block
        {
            return Ok(place);
        }
        self.fill_up_to(block, writes)?;
        let place = self.allocate(block, payload, writes)?;
        self.filled = self.filled.max(block.saturating_add(1));
        self.last = Some((block, place));
        Ok(place)
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_of_the_sheet() {
        // The sheet's examples at cluster_bits 16: 41472 bytes from 0x50000, then 314 from 0x5a0c6.
        assert_eq!(compressed_entry(0x50000, 41_000, 16).unwrap(), 0x5400_0000_0005_0000);
        assert_eq!(compressed_entry(0x5a0c6, 100, 16).unwrap(), 0x4000_0000_0005_a0c6);
    }
}
