//! Differencing images, written byte by byte from the format sheets: nothing of the library is used to make them.

use std::collections::BTreeMap;

/// Bytes of the unit in which the builders take data: a grain, a cluster, a block of the small VDIs made here.
pub const UNIT: u64 = 64 << 10;

/// What an image holds of its disk.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Bytes of the disk.
    pub size: u64,
    /// Units with data, by number.
    pub data: BTreeMap<u64, Vec<u8>>,
    /// Units marked as zero: they hide the parent's.
    pub zero: Vec<u64>,
}

impl Content {
    /// A disk of `size` bytes that holds nothing.
    pub fn new(size: u64) -> Self {
        Content { size, ..Content::default() }
    }
    /// With noise in unit `number`.
    pub fn data(mut self, number: u64, seed: u64) -> Self {
        self.data.insert(number, crate::disks::noise(seed, UNIT as usize));
        self
    }
    /// With unit `number` marked as zero.
    pub fn zero(mut self, number: u64) -> Self {
        self.zero.push(number);
        self
    }
    /// What a guest sees of this over `parent`; what the parent does not reach is zeros.
    pub fn over(&self, parent: &[u8]) -> Vec<u8> {
        let mut disk = vec![0u8; self.size as usize];
        let common = disk.len().min(parent.len());
        disk[..common].copy_from_slice(&parent[..common]);
        let zeroes = vec![0u8; UNIT as usize];
        let zero = self.zero.iter().map(|number| (number, &zeroes));
        for (number, bytes) in self.data.iter().chain(zero) {
            let at = (number * UNIT) as usize;
            let len = bytes.len().min(disk.len().saturating_sub(at));
            disk[at..at + len].copy_from_slice(&bytes[..len]);
        }
        disk
    }
    fn units(&self) -> u64 {
        self.size.div_ceil(UNIT)
    }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A UUID as it is printed, from one byte.
pub fn uuid_text(byte: u8) -> String {
    let hex = format!("{byte:02x}").repeat(16);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A UUID on disk, from one byte. All bytes are equal, so that Microsoft's order is the printed one.
pub fn uuid_bytes(byte: u8) -> [u8; 16] {
    [byte; 16]
}

/// Bit 63 of the entries of a QCOW2's tables.
const COPIED: u64 = 1 << 63;

/// A QCOW2 image with its backing file.
#[derive(Clone, Debug, Default)]
pub struct Qcow2Image<'a> {
    /// What it holds.
    pub content: Content,
    /// Name of the backing file.
    pub backing: Option<&'a str>,
    /// Format of the backing file.
    pub backing_format: Option<&'a str>,
}

impl Qcow2Image<'_> {
    /// The file: header, refcount table, refcount block, L1, one L2, data. Up to 512 MiB.
    pub fn build(&self) -> Vec<u8> {
        let cluster = UNIT as usize;
        let mut file = vec![0u8; 5 * cluster];
        put(&mut file, 0, b"QFI\xfb\0\0\0\x03");
        put(&mut file, 20, &16u32.to_be_bytes());
        put(&mut file, 24, &self.content.size.to_be_bytes());
        put(&mut file, 36, &1u32.to_be_bytes());
        put(&mut file, 40, &(3 * UNIT).to_be_bytes());
        put(&mut file, 48, &UNIT.to_be_bytes());
        put(&mut file, 56, &1u32.to_be_bytes());
        put(&mut file, 96, &4u32.to_be_bytes());
        put(&mut file, 100, &104u32.to_be_bytes());
        let mut at = 104;
        if let Some(format) = self.backing_format {
            put(&mut file, at, &0xE279_2ACAu32.to_be_bytes());
            put(&mut file, at + 4, &(format.len() as u32).to_be_bytes());
            put(&mut file, at + 8, format.as_bytes());
            at += 8 + format.len().next_multiple_of(8);
        }
        at += 8;
        if let Some(name) = self.backing {
            put(&mut file, 8, &(at as u64).to_be_bytes());
            put(&mut file, 16, &(name.len() as u32).to_be_bytes());
            put(&mut file, at, name.as_bytes());
        }
        put(&mut file, cluster, &(2 * UNIT).to_be_bytes());
        put(&mut file, 3 * cluster, &((4 * UNIT) | COPIED).to_be_bytes());
        for number in &self.content.zero {
            put(&mut file, 4 * cluster + 8 * *number as usize, &1u64.to_be_bytes());
        }
        for (number, bytes) in &self.content.data {
            let place = file.len() as u64;
            put(&mut file, 4 * cluster + 8 * *number as usize, &(place | COPIED).to_be_bytes());
            let mut whole = bytes.clone();
            whole.resize(cluster, 0);
            file.extend_from_slice(&whole);
        }
        for used in 0..file.len() / cluster {
            put(&mut file, 2 * cluster + 2 * used, &1u16.to_be_bytes());
        }
        file
    }
}

/// A monolithicSparse VMDK.
#[derive(Clone, Debug)]
pub struct VmdkImage<'a> {
    /// What it holds.
    pub content: Content,
    /// Content id.
    pub cid: u32,
    /// The parent's content id; `ffffffff` for none.
    pub parent_cid: u32,
    /// `parentFileNameHint`.
    pub hint: Option<&'a str>,
    /// Bytes of `ddb.uuid.image`, `.modification`, `.parent`, `.parentmodification`, as VirtualBox writes them.
    pub uuids: Option<[u8; 4]>,
}

impl VmdkImage<'_> {
    /// A base image.
    pub fn base(content: Content, cid: u32) -> Self {
        VmdkImage { content, cid, parent_cid: u32::MAX, hint: None, uuids: None }
    }

    fn descriptor(&self, name: &str) -> String {
        let mut text = String::from("# Disk DescriptorFile\nversion=1\n");
        text += &format!("CID={:08x}\nparentCID={:08x}\n", self.cid, self.parent_cid);
        text += "createType=\"monolithicSparse\"\n";
        if let Some(hint) = self.hint {
            text += &format!("parentFileNameHint=\"{hint}\"\n");
        }
        text += &format!("\n# Extent description\nRW {} SPARSE \"{name}\"\n", self.content.size / 512);
        text += "\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\nddb.virtualHWVersion = \"4\"\n";
        if let Some(uuids) = self.uuids {
            for (key, byte) in ["image", "modification", "parent", "parentmodification"].iter().zip(uuids) {
                text += &format!("ddb.uuid.{key}=\"{}\"\n", uuid_text(byte));
            }
        }
        text
    }

    /// The file with the name `name`: header, descriptor, directory, one grain table for each 32 MiB, grains.
    pub fn build(&self, name: &str) -> Vec<u8> {
        let grain = 128u64;
        let capacity = self.content.size / 512;
        let tables = self.content.units().div_ceil(512);
        let directory = 21u64;
        let directory_sectors = (tables * 4).div_ceil(512);
        let first_table = directory + directory_sectors;
        let overhead = (first_table + tables * 4).next_multiple_of(grain);
        let mut file = vec![0u8; (overhead * 512) as usize];
        let zeroed = !self.content.zero.is_empty();
        put(&mut file, 0, b"KDMV");
        put(&mut file, 4, &(if zeroed { 2u32 } else { 1 }).to_le_bytes());
        put(&mut file, 8, &(if zeroed { 5u32 } else { 1 }).to_le_bytes());
        put(&mut file, 12, &capacity.to_le_bytes());
        put(&mut file, 20, &grain.to_le_bytes());
        put(&mut file, 28, &1u64.to_le_bytes());
        put(&mut file, 36, &20u64.to_le_bytes());
        put(&mut file, 44, &512u32.to_le_bytes());
        put(&mut file, 56, &directory.to_le_bytes());
        put(&mut file, 64, &overhead.to_le_bytes());
        put(&mut file, 73, b"\n \r\n");
        put(&mut file, 512, self.descriptor(name).as_bytes());
        for table in 0..tables {
            let sector = (first_table + table * 4) as u32;
            put(&mut file, (directory * 512 + table * 4) as usize, &sector.to_le_bytes());
        }
        let entry = |number: u64| (first_table * 512 + number * 4) as usize;
        for number in &self.content.zero {
            put(&mut file, entry(*number), &1u32.to_le_bytes());
        }
        for (number, bytes) in &self.content.data {
            let sector = (file.len() / 512) as u32;
            put(&mut file, entry(*number), &sector.to_le_bytes());
            let mut whole = bytes.clone();
            whole.resize(UNIT as usize, 0);
            file.extend_from_slice(&whole);
        }
        file
    }
}

/// A VDI with blocks of [`UNIT`]; differencing if it has a parent.
#[derive(Clone, Debug)]
pub struct VdiImage {
    /// What it holds.
    pub content: Content,
    /// Bytes of `uuidCreate` and `uuidModify`.
    pub uuids: [u8; 2],
    /// Bytes of `uuidLinkage` and `uuidParentModify`; 0 is null.
    pub parent: Option<[u8; 2]>,
}

impl VdiImage {
    /// The file: header, block map, blocks.
    pub fn build(&self) -> Vec<u8> {
        let blocks = self.content.units();
        let map = 0x200u64;
        let data = (map + 4 * blocks).next_multiple_of(512);
        let mut file = vec![0u8; data as usize];
        put(&mut file, 0, b"<<< Oracle VM VirtualBox Disk Image >>>\n");
        let words: [(usize, u32); 10] = [
            (0x40, 0xbeda_107f),
            (0x44, 0x0001_0001),
            (0x48, 0x180),
            (0x4c, if self.parent.is_some() { 4 } else { 1 }),
            (0x154, map as u32),
            (0x158, data as u32),
            (0x168, 512),
            (0x178, UNIT as u32),
            (0x180, blocks as u32),
            (0x184, self.content.data.len() as u32),
        ];
        for (at, word) in words {
            put(&mut file, at, &word.to_le_bytes());
        }
        put(&mut file, 0x170, &self.content.size.to_le_bytes());
        put(&mut file, 0x188, &uuid_bytes(self.uuids[0]));
        put(&mut file, 0x198, &uuid_bytes(self.uuids[1]));
        if let Some([linkage, modify]) = self.parent {
            put(&mut file, 0x1a8, &uuid_bytes(linkage));
            put(&mut file, 0x1b8, &uuid_bytes(modify));
        }
        let entry = |number: u64| (map + number * 4) as usize;
        for number in 0..blocks {
            put(&mut file, entry(number), &u32::MAX.to_le_bytes());
        }
        for number in &self.content.zero {
            put(&mut file, entry(*number), &(u32::MAX - 1).to_le_bytes());
        }
        for (index, (number, bytes)) in self.content.data.iter().enumerate() {
            put(&mut file, entry(*number), &(index as u32).to_le_bytes());
            let mut whole = bytes.clone();
            whole.resize(UNIT as usize, 0);
            file.extend_from_slice(&whole);
        }
        file
    }
}

/// A dynamic or differencing VHD with blocks of 512 KiB.
#[derive(Clone, Debug)]
pub struct VhdImage<'a> {
    /// What it holds. Zero units are stored as zeros: the format has no mark for them.
    pub content: Content,
    /// Byte of `uniqueId`.
    pub id: u8,
    /// Byte of `parentUniqueId` and where the parent is.
    pub parent: Option<(u8, VhdPlaces<'a>)>,
}

/// Where a differencing VHD says that its parent is.
#[derive(Clone, Copy, Debug, Default)]
pub struct VhdPlaces<'a> {
    /// Locator `W2ru`: relative.
    pub relative: Option<&'a str>,
    /// Locator `W2ku`: absolute.
    pub absolute: Option<&'a str>,
    /// `parentUnicodeName`.
    pub name: Option<&'a str>,
}

/// Bytes of a block of [`VhdImage`].
const VHD_BLOCK: u64 = 512 << 10;

fn vhd_checksum(bytes: &[u8]) -> [u8; 4] {
    (!bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))).to_be_bytes()
}

impl VhdImage<'_> {
    fn footer(&self) -> Vec<u8> {
        let mut footer = vec![0u8; 512];
        put(&mut footer, 0, b"conectix\0\0\0\x02\0\x01\0\0");
        put(&mut footer, 16, &512u64.to_be_bytes());
        put(&mut footer, 28, b"win \0\x06\0\x01Wi2k");
        put(&mut footer, 40, &self.content.size.to_be_bytes());
        put(&mut footer, 48, &self.content.size.to_be_bytes());
        // 65535/16/255: the size of the field counts, not the geometry.
        put(&mut footer, 56, &[0xff, 0xff, 16, 255]);
        put(&mut footer, 60, &(if self.parent.is_some() { 4u32 } else { 3 }).to_be_bytes());
        put(&mut footer, 68, &uuid_bytes(self.id));
        let checksum = vhd_checksum(&footer);
        put(&mut footer, 64, &checksum);
        footer
    }

    fn dynamic_header(&self, blocks: u64, locators: &[(&[u8; 4], Vec<u8>, u64)]) -> Vec<u8> {
        let mut header = vec![0u8; 1024];
        put(&mut header, 0, b"cxsparse");
        put(&mut header, 8, &u64::MAX.to_be_bytes());
        put(&mut header, 16, &1536u64.to_be_bytes());
        put(&mut header, 24, &0x0001_0000u32.to_be_bytes());
        put(&mut header, 28, &(blocks as u32).to_be_bytes());
        put(&mut header, 32, &(VHD_BLOCK as u32).to_be_bytes());
        if let Some((id, places)) = &self.parent {
            put(&mut header, 40, &uuid_bytes(*id));
            put(&mut header, 56, &700_000_000u32.to_be_bytes());
            if let Some(name) = places.name {
                let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
                put(&mut header, 64, &name);
            }
        }
        for (slot, (code, text, at)) in locators.iter().enumerate() {
            let entry = 576 + slot * 24;
            put(&mut header, entry, *code);
            put(&mut header, entry + 4, &512u32.to_be_bytes());
            put(&mut header, entry + 8, &(text.len() as u32).to_be_bytes());
            put(&mut header, entry + 16, &at.to_be_bytes());
        }
        let checksum = vhd_checksum(&header);
        put(&mut header, 36, &checksum);
        header
    }

    /// The file: footer, header, BAT, locators, blocks with their bitmaps, footer.
    pub fn build(&self) -> Vec<u8> {
        let blocks = self.content.size.div_ceil(VHD_BLOCK);
        let bat_end = (1536 + 4 * blocks).next_multiple_of(512);
        let places = self.parent.as_ref().map(|(_, places)| *places).unwrap_or_default();
        let mut locators: Vec<(&[u8; 4], Vec<u8>, u64)> = Vec::new();
        for (code, place) in [(b"W2ru", places.relative), (b"W2ku", places.absolute)] {
            if let Some(place) = place {
                let text: Vec<u8> = place.encode_utf16().flat_map(u16::to_le_bytes).collect();
                locators.push((code, text, bat_end + 512 * locators.len() as u64));
            }
        }
        let mut file = vec![0u8; (bat_end + 512 * locators.len() as u64) as usize];
        file[1536..bat_end as usize].fill(0xff);
        put(&mut file, 0, &self.footer());
        put(&mut file, 512, &self.dynamic_header(blocks, &locators));
        for (_, text, at) in &locators {
            put(&mut file, *at as usize, text);
        }
        for (block, units) in self.by_block() {
            let sector = (file.len() / 512) as u32;
            put(&mut file, (1536 + 4 * block) as usize, &sector.to_be_bytes());
            let (mut bitmap, mut data) = (vec![0u8; 512], vec![0u8; VHD_BLOCK as usize]);
            for (number, bytes) in units {
                let at = (number * UNIT - block * VHD_BLOCK) as usize;
                data[at..at + bytes.len()].copy_from_slice(&bytes);
                for sector in at / 512..(at + bytes.len()).div_ceil(512) {
                    bitmap[sector / 8] |= 0x80 >> (sector % 8);
                }
            }
            file.extend_from_slice(&bitmap);
            file.extend_from_slice(&data);
        }
        file.extend_from_slice(&self.footer());
        file
    }

    fn by_block(&self) -> BTreeMap<u64, Vec<(u64, Vec<u8>)>> {
        let mut blocks: BTreeMap<u64, Vec<(u64, Vec<u8>)>> = BTreeMap::new();
        let zero = self.content.zero.iter().map(|number| (*number, vec![0u8; UNIT as usize]));
        let data = self.content.data.iter().map(|(number, bytes)| (*number, bytes.clone()));
        for (number, bytes) in data.chain(zero) {
            blocks.entry(number * UNIT / VHD_BLOCK).or_default().push((number, bytes));
        }
        blocks
    }
}
