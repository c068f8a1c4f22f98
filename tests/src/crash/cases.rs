//! The formats under test: how each image is made.

/// A format, its options and its parent.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What replay lines call it.
    pub name: &'static str,
    /// The driver's name.
    pub format: &'static str,
    /// Its options.
    pub options: &'static [(&'static str, &'static str)],
    /// Allocation unit in bytes.
    pub block: u64,
    /// Units of the disk. The last one is three sectors short.
    pub blocks: u64,
    /// The image is a child of this one.
    pub parent: Option<Parent>,
    /// And the parent is a child of that one.
    pub grandparent: Option<Parent>,
    /// What the image holds at first is compressed.
    pub compressed: bool,
    /// What QEMU calls the format, if it reads this variant.
    pub peer: Option<&'static str>,
    /// Guests write whole sectors only. In an external data file every cluster has its place from the start, so that
    /// a write of parts of a sector can be torn inside it.
    pub whole_sectors: bool,
    /// Part of the crash states that the daily test checks, in hundredths of what is asked for.
    pub share: usize,
}

/// The parent of an image under test.
#[derive(Clone, Copy, Debug)]
pub struct Parent {
    /// The driver's name.
    pub format: &'static str,
    /// Its options.
    pub options: &'static [(&'static str, &'static str)],
    /// Units that it is shorter than the image under test.
    pub shorter: u64,
}

const RAW_PARENT: Parent = Parent { format: "raw", options: &[], shorter: 0 };
const SHORT_RAW_PARENT: Parent = Parent { shorter: 2, ..RAW_PARENT };

const fn case(
    name: &'static str,
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    block: u64,
    blocks: u64,
) -> Case {
    Case {
        name,
        format,
        options,
        block,
        blocks,
        parent: None,
        grandparent: None,
        compressed: false,
        peer: None,
        whole_sectors: false,
        share: 100,
    }
}

/// All of them. The names of those that CI counts stand in RELIABILITY.md section 3 and issue 3.
pub const CASES: &[Case] = &[
    Case { peer: Some("raw"), ..case("raw", "raw", &[], 4096, 8) },
    case("vdi", "vdi", &[("block_size", "4k")], 4096, 8),
    Case { peer: Some("vdi"), share: 5, ..case("vdi-1m", "vdi", &[], 1 << 20, 5) },
    Case {
        parent: Some(Parent { format: "vdi", options: &[("block_size", "4k")], shorter: 0 }),
        share: 50,
        ..case("vdi-child", "vdi", &[("block_size", "4k")], 4096, 8)
    },
    Case {
        parent: Some(Parent { format: "vdi", options: &[("block_size", "4k")], shorter: 0 }),
        grandparent: Some(Parent { format: "vdi", options: &[("block_size", "4k")], shorter: 1 }),
        share: 30,
        ..case("vdi-chain", "vdi", &[("block_size", "4k")], 4096, 8)
    },
    case("vhd", "vhd", &[("block_size", "4k")], 4096, 8),
    Case { peer: Some("vpc"), share: 5, ..case("vhd-2m", "vhd", &[], 2 << 20, 5) },
    Case { peer: Some("vpc"), share: 30, ..case("vhd-fixed", "vhd", &[("subformat", "fixed")], 4096, 8) },
    Case {
        parent: Some(Parent { format: "vhd", options: &[("block_size", "4k")], shorter: 0 }),
        grandparent: Some(Parent { format: "vhd", options: &[("block_size", "4k")], shorter: 1 }),
        share: 30,
        ..case("vhd-chain", "vhd", &[("block_size", "4k")], 4096, 8)
    },
    Case {
        parent: Some(Parent { format: "vhd", options: &[("block_size", "4k")], shorter: 0 }),
        ..case("vhd-child", "vhd", &[("block_size", "4k")], 4096, 8)
    },
    case("vmdk", "vmdk", &[("grain_size", "4k")], 4096, 8),
    Case { peer: Some("vmdk"), share: 20, ..case("vmdk-64k", "vmdk", &[], 64 << 10, 6) },
    Case {
        share: 30,
        ..case("vmdk-zeroed", "vmdk", &[("grain_size", "4k"), ("zeroed_grain", "on")], 4096, 8)
    },
    Case {
        parent: Some(Parent { format: "vmdk", options: &[("grain_size", "4k")], shorter: 0 }),
        share: 50,
        ..case("vmdk-child", "vmdk", &[("grain_size", "4k")], 4096, 8)
    },
    Case {
        parent: Some(Parent { format: "vmdk", options: &[("grain_size", "4k")], shorter: 0 }),
        grandparent: Some(Parent { format: "vmdk", options: &[("grain_size", "4k")], shorter: 1 }),
        share: 30,
        ..case("vmdk-chain", "vmdk", &[("grain_size", "4k")], 4096, 8)
    },
    Case {
        peer: Some("vmdk"),
        share: 30,
        ..case("vmdk-flat", "vmdk", &[("subformat", "monolithicFlat")], 4096, 8)
    },
    Case {
        peer: Some("vmdk"),
        share: 10,
        // The last unit lies in the second file.
        ..case(
            "vmdk-split",
            "vmdk",
            &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M"), ("grain_size", "256k")],
            256 << 10,
            5,
        )
    },
    Case { peer: Some("qcow2"), ..case("qcow2", "qcow2", &[("cluster_size", "4k")], 4096, 8) },
    Case {
        peer: Some("qcow2"),
        share: 50,
        ..case("qcow2-512", "qcow2", &[("cluster_size", "512")], 512, 130)
    },
    Case { peer: Some("qcow2"), share: 20, ..case("qcow2-64k", "qcow2", &[], 64 << 10, 6) },
    Case {
        peer: Some("qcow2"),
        ..case("qcow2-sub", "qcow2", &[("extended_l2", "on"), ("cluster_size", "16k")], 16 << 10, 6)
    },
    Case {
        peer: Some("qcow2"),
        parent: Some(SHORT_RAW_PARENT),
        ..case("qcow2-child", "qcow2", &[("cluster_size", "4k")], 4096, 8)
    },
    Case {
        peer: Some("qcow2"),
        parent: Some(RAW_PARENT),
        share: 50,
        ..case("qcow2-sub-child", "qcow2", &[("extended_l2", "on"), ("cluster_size", "16k")], 16 << 10, 6)
    },
    Case {
        peer: Some("qcow2"),
        parent: Some(Parent { format: "qcow2", options: &[("cluster_size", "4k")], shorter: 1 }),
        grandparent: Some(SHORT_RAW_PARENT),
        share: 30,
        ..case("qcow2-chain", "qcow2", &[("cluster_size", "4k")], 4096, 8)
    },
    Case {
        peer: Some("qcow2"),
        share: 50,
        ..case("qcow2-lazy", "qcow2", &[("lazy_refcounts", "on"), ("cluster_size", "4k")], 4096, 8)
    },
    Case { share: 20, ..case("qcow2-v2", "qcow2", &[("compat", "v2"), ("cluster_size", "4k")], 4096, 8) },
    Case {
        peer: Some("qcow2"),
        compressed: true,
        share: 30,
        ..case("qcow2-zlib", "qcow2", &[("cluster_size", "4k")], 4096, 8)
    },
    Case {
        whole_sectors: true,
        share: 30,
        ..case("qcow2-data", "qcow2", &[("data_file", "disk.data"), ("cluster_size", "4k")], 4096, 8)
    },
    Case {
        whole_sectors: true,
        share: 30,
        ..case(
            "qcow2-data-raw",
            "qcow2",
            &[("data_file", "disk.data"), ("data_file_raw", "on"), ("cluster_size", "4k")],
            4096,
            8,
        )
    },
];

impl Case {
    /// The case with this name.
    pub fn named(name: &str) -> Case {
        *CASES.iter().find(|case| case.name == name).unwrap_or_else(|| panic!("there is no case {name:?}"))
    }

    /// Whether snapshots inside the image are made. With an external data file there are none. Version 2 of QCOW2 has no
    /// mark that says "count anew", so that counts and COPIED flags may differ after a crash, whoever writes.
    pub fn has_snapshots(&self) -> bool {
        self.format == "qcow2"
            && !self.options.iter().any(|(name, value)| *name == "data_file" || *value == "v2")
    }

    /// Size of the disk in bytes: an odd number of sectors.
    pub fn size(&self) -> u64 {
        self.block * self.blocks - if self.block > 1536 { 3 * 512 } else { 0 }
    }

    /// Size of `parent` in bytes.
    pub fn parent_size(&self, parent: &Parent) -> u64 {
        self.size() - parent.shorter * self.block
    }

    /// Whether the sector that is written with `bytes` has a checksum, so that it may be torn inside: the footers of VHD.
    pub fn is_sealed(&self, bytes: &[u8]) -> bool {
        self.format == "vhd" && bytes.starts_with(b"conectix")
    }
}
