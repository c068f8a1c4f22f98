//! QCOW2 (sheet qcow2.md): the worked example of section 14, and what can be wrong with its header.

use super::kit::{Cases, Check, Content, Sparse, pattern};
use vellum::Code;

const MIB: u64 = 1 << 20;
pub(super) const CLUSTER: u64 = 64 << 10;
/// Where the tables of [`base`] stand.
pub(super) const REFTABLE: u64 = 0x10000;
pub(super) const REFBLOCK: u64 = 0x20000;
pub(super) const L1: u64 = 0x30000;
pub(super) const L2: u64 = 0x40000;
pub(super) const DATA: u64 = 0x50000;

/// Version 3, 10 MiB, data at 1 MiB, a zero cluster at 2 MiB.
pub(super) fn base() -> Sparse {
    Sparse::zeros(0x60000)
        .put(0, b"QFI\xfb")
        .be32(4, 3)
        .be32(20, 16)
        .be64(24, 10 * MIB)
        .be32(36, 1)
        .be64(40, L1)
        .be64(48, REFTABLE)
        .be32(56, 1)
        .be32(96, 4)
        .be32(100, 112)
        .be64(REFTABLE, REFBLOCK)
        .put(REFBLOCK, &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
        .be64(L1, 0x8000_0000_0000_0000 | L2)
        .be64(L2 + 16 * 8, 0x8000_0000_0000_0000 | DATA)
        .be64(L2 + 32 * 8, 1)
        .put(DATA, &pattern(80, 4096))
}

pub(super) fn content() -> Check {
    Check {
        size: 10 * MIB,
        data: vec![(MIB, pattern(80, 4096))],
        zeros: vec![0..MIB, MIB + CLUSTER..10 * MIB],
    }
}

/// Header extensions from byte 112 on.
pub(super) fn extensions(file: Sparse, list: &[(u32, &[u8])]) -> Sparse {
    let mut at = 112;
    let mut file = file;
    for (kind, data) in list {
        file = file.be32(at, *kind).be32(at + 4, data.len() as u32).put(at + 8, data);
        at += 8 + (data.len() as u64).next_multiple_of(8);
    }
    file
}

/// With the name of a backing file, and its format if one is given.
pub(super) fn backed(name: &[u8], format: Option<&[u8]>) -> Sparse {
    let file = match format {
        Some(format) => extensions(base(), &[(0xE279_2ACA, format)]),
        None => base(),
    };
    file.be64(8, 0x400).be32(16, name.len() as u32).put(0x400, name)
}

pub(super) fn add(cases: &mut Cases) {
    numbers(cases);
    tables(cases);
    features(cases);
    header_end(cases);
    header_extensions(cases);
    names(cases);
    snapshots(cases);
    odd(cases);
}

fn numbers(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, at, value, code, field| {
        cases.refuse(name, 1, base().be32(at, value), code).as_format("qcow2").field(field, at);
    };
    bad(cases, "qcow2/magic", 0, 0x5146_49FC, Code::BadMagic, "magic");
    bad(cases, "qcow2/version-0", 4, 0, Code::Version, "version");
    bad(cases, "qcow2/version-1", 4, 1, Code::Version, "version");
    bad(cases, "qcow2/version-4", 4, 4, Code::Version, "version");
    bad(cases, "qcow2/version-max", 4, u32::MAX, Code::Version, "version");
    for (name, value) in [
        ("qcow2/cluster-bits-0", 0),
        ("qcow2/cluster-bits-8", 8),
        ("qcow2/cluster-bits-22", 22),
        ("qcow2/cluster-bits-63", 63),
        ("qcow2/cluster-bits-64", 64),
        ("qcow2/cluster-bits-max", u32::MAX),
    ] {
        bad(cases, name, 20, value, Code::Range, "cluster_bits");
    }
    bad(cases, "qcow2/refcount-order-7", 96, 7, Code::Range, "refcount_order");
    bad(cases, "qcow2/refcount-order-max", 96, u32::MAX, Code::Range, "refcount_order");
    for (name, value) in [
        ("qcow2/header-length-0", 0),
        ("qcow2/header-length-72", 72),
        ("qcow2/header-length-103", 103),
        ("qcow2/header-length-odd", 113),
        ("qcow2/header-length-cluster", CLUSTER as u32 + 8),
        ("qcow2/header-length-max", u32::MAX - 7),
    ] {
        bad(cases, name, 100, value, Code::Range, "header_length");
    }
    cases.refuse("qcow2/size-max", 1, base().be64(24, u64::MAX), Code::SizeLie).field("l1_size", 36);
    cases.refuse("qcow2/size-2-63", 1, base().be64(24, 1 << 63), Code::SizeLie).field("l1_size", 36);
    cases
        .refuse("qcow2/size-larger-than-l1", 4, base().be64(24, 1 << 40), Code::SizeLie)
        .field("l1_size", 36);
    cases.refuse("qcow2/size-2-62", 4, base().be64(24, 1 << 62), Code::SizeLie).or(Code::TableLimit);
    cases.refuse("qcow2/l1-size-0", 4, base().be32(36, 0), Code::SizeLie).field("l1_size", 36);
    bad(cases, "qcow2/l1-size-max", 36, u32::MAX, Code::TableLimit, "l1_size");
    bad(cases, "qcow2/l1-size-just-over", 36, (4 << 20) + 1, Code::TableLimit, "l1_size");
    cases.refuse("qcow2/l1-longer-than-file", 1, base().be32(36, 4 << 20), Code::OutOfFile);
}

fn tables(cases: &mut Cases) {
    let l1 = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, base().be64(40, value), code).field("l1_table_offset", 40);
    };
    l1(cases, "qcow2/l1-at-0", 0, Code::Overlap);
    l1(cases, "qcow2/l1-misaligned", L1 + 512, Code::Misaligned);
    l1(cases, "qcow2/l1-past-end", 1 << 40, Code::OutOfFile);
    l1(cases, "qcow2/l1-at-end", 0x60000, Code::OutOfFile);
    l1(cases, "qcow2/l1-max", !(CLUSTER - 1), Code::OutOfFile);
    l1(cases, "qcow2/l1-on-refcount-table", REFTABLE, Code::Overlap);
    let reftable = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, base().be64(48, value), code).field("refcount_table_offset", 48);
    };
    reftable(cases, "qcow2/refcount-table-at-0", 0, Code::Overlap);
    reftable(cases, "qcow2/refcount-table-misaligned", REFTABLE + 8, Code::Misaligned);
    reftable(cases, "qcow2/refcount-table-past-end", 1 << 50, Code::OutOfFile);
    cases
        .refuse("qcow2/refcount-clusters-max", 1, base().be32(56, u32::MAX), Code::TableLimit)
        .field("refcount_table_clusters", 56);
    cases
        .refuse("qcow2/refcount-clusters-129", 1, base().be32(56, 129), Code::TableLimit)
        .field("refcount_table_clusters", 56);
    cases
        .refuse("qcow2/refcount-clusters-0", 1, base().be32(56, 0), Code::Range)
        .field("refcount_table_clusters", 56);
}

fn features(cases: &mut Cases) {
    let incompat = |cases: &mut Cases, name: &str, class, value: u64, code| {
        cases.refuse(name, class, base().be64(72, value), code).field("incompatible_features", 72);
    };
    incompat(cases, "qcow2/feature-bit-5", 8, 1 << 5, Code::Feature);
    incompat(cases, "qcow2/feature-bit-63", 8, 1 << 63, Code::Feature);
    incompat(cases, "qcow2/features-all", 1, u64::MAX, Code::Feature);
    cases.refuse("qcow2/encrypted-aes", 7, base().be32(32, 1), Code::Feature).field("crypt_method", 32);
    cases.refuse("qcow2/encrypted-luks", 7, base().be32(32, 2), Code::Feature).field("crypt_method", 32);
    let luks = extensions(base().be32(32, 2), &[(0x0537_BE77, &[0; 16])]);
    cases.refuse("qcow2/encrypted-luks-header-at-0", 2, luks, Code::Feature).field("crypt_method", 32);
    cases.refuse("qcow2/encryption-unknown", 1, base().be32(32, 3), Code::Feature).field("crypt_method", 32);
    cases
        .refuse("qcow2/encryption-max", 1, base().be32(32, u32::MAX), Code::Feature)
        .field("crypt_method", 32);
    let v2 = || base().be32(4, 2).put(72, &[0; 40]);
    cases.refuse("qcow2/v2-encrypted-aes", 7, v2().be32(32, 1), Code::Feature).field("crypt_method", 32);
    let packed = |kind: u8, bit: u64| base().be64(72, bit << 3).put(104, &[kind]);
    cases.refuse("qcow2/compression-type-2", 1, packed(2, 1), Code::Feature).field("compression_type", 104);
    cases
        .refuse("qcow2/compression-type-max", 1, packed(255, 1), Code::Feature)
        .field("compression_type", 104);
    cases
        .refuse("qcow2/compression-bit-without-type", 4, packed(0, 1), Code::Corrupt)
        .about("compression_type");
    cases
        .refuse("qcow2/compression-type-without-bit", 4, packed(1, 0), Code::Corrupt)
        .about("compression_type");
    cases
        .refuse("qcow2/extended-l2-small-clusters", 1, base().be64(72, 1 << 4).be32(20, 13), Code::Range)
        .about("cluster_bits");
    // Reading a dirty or corrupt image is allowed: its tables are believed, its refcounts are not needed.
    cases.accept("qcow2/dirty", 7, base().be64(72, 1), content());
    cases.accept("qcow2/corrupt-flag", 7, base().be64(72, 2), content());
    cases.accept("qcow2/lazy-refcounts", 8, base().be64(80, 1), content());
    cases.accept("qcow2/compatible-unknown", 8, base().be64(80, u64::MAX), content());
    cases.accept("qcow2/autoclear-unknown", 8, base().be64(88, 0xFFFF_FFFF_FFFF_FFFC), content());
}

fn header_end(cases: &mut Cases) {
    for (name, len) in [("qcow2/cut-in-header", 71), ("qcow2/cut-in-v3-header", 103)] {
        cases.refuse(name, 5, base().cut(len), Code::Truncated).as_format("qcow2");
    }
    for (name, len) in [("qcow2/cut-0", 0), ("qcow2/cut-in-magic", 3)] {
        cases.refuse(name, 5, base().cut(len), Code::BadMagic).as_format("qcow2");
    }
    cases.refuse("qcow2/cut-before-compression-type", 5, base().cut(104), Code::OutOfFile);
    cases.refuse("qcow2/cut-in-cluster-0", 5, base().cut(4096), Code::OutOfFile);
    cases.refuse("qcow2/cut-before-l1", 5, base().cut(L1), Code::OutOfFile).about("l1_table_offset");
    cases.refuse("qcow2/cut-in-l1", 5, base().cut(L1 + 7), Code::OutOfFile).about("l1_table_offset");
    cases.refuse("qcow2/cut-before-l2", 5, base().cut(L2), Code::OutOfFile).about("L1 entry");
    cases.refuse("qcow2/cut-in-l2", 5, base().cut(L2 + 1000), Code::OutOfFile).about("L1 entry");
    cases.refuse("qcow2/cut-before-data", 5, base().cut(DATA), Code::OutOfFile).about("L2 entry");
}

fn header_extensions(cases: &mut Cases) {
    let length = |value: u32| base().be32(112, 0xE279_2ACA).be32(116, value);
    cases.refuse("qcow2/extension-length-max", 1, length(u32::MAX), Code::Range);
    cases.refuse("qcow2/extension-past-cluster-0", 1, length(CLUSTER as u32), Code::Range);
    let twice: &[(u32, &[u8])] = &[(0xE279_2ACA, b"raw"), (0xE279_2ACA, b"qcow2")];
    cases.refuse("qcow2/extension-twice", 4, extensions(base(), twice), Code::Corrupt);
    // 64 KiB of empty extensions without an end mark.
    let mut endless = base();
    for at in (112..CLUSTER).step_by(8) {
        endless = endless.be32(at, 0x1000_0000 + at as u32);
    }
    cases.accept("qcow2/extensions-without-end", 6, endless, content());
    let twice: &[(u32, &[u8])] = &[(0xDEAD_BEEF, b"1"), (0xDEAD_BEEF, b"2")];
    cases.refuse("qcow2/extension-unknown-twice", 4, extensions(base(), twice), Code::Corrupt);
    let bitmaps = |count: u32, size: u64, offset: u64| {
        let mut data = Vec::new();
        data.extend(count.to_be_bytes());
        data.extend([0; 4]);
        data.extend(size.to_be_bytes());
        data.extend(offset.to_be_bytes());
        extensions(base(), &[(0x2385_2875, &data)]).be64(88, 1)
    };
    cases.refuse("qcow2/bitmaps-max", 1, bitmaps(u32::MAX, u64::MAX, u64::MAX), Code::TableLimit);
    cases.refuse("qcow2/bitmaps-65536", 1, bitmaps(65536, 64, 0x50000), Code::TableLimit);
    let most = bitmaps(65535, 65535 * 24, 0x60000).cut(0x60000 + 65535 * 24);
    cases.accept("qcow2/bitmaps-65535", 6, most, content());
    cases.refuse("qcow2/bitmaps-directory-past-end", 2, bitmaps(1, 64, 1 << 40), Code::OutOfFile);
    let table = [&[0u8, 0][..], &[0xff; 46], &[2, 63], &[b'x'; 46]].concat();
    cases.accept("qcow2/feature-names-garbage", 8, extensions(base(), &[(0x6803_F857, &table)]), content());
    cases.accept("qcow2/extension-unknown", 8, extensions(base(), &[(0xDEAD_BEEF, &[7; 99])]), content());
}

fn names(cases: &mut Cases) {
    let named = |offset: u64, len: u32| base().be64(8, offset).be32(16, len).put(0x400, b"base.img");
    let mut bad = |name: &str, offset, len, code, field| {
        cases
            .refuse(name, 1, named(offset, len), code)
            .about(field)
            .beside("base.img", Content::Regular(Sparse::zeros(MIB)));
    };
    bad("qcow2/backing-name-1024", 0x400, 1024, Code::Range, "backing_file_size");
    bad("qcow2/backing-name-max", 0x400, u32::MAX, Code::Range, "backing_file_size");
    bad("qcow2/backing-name-0", 0x400, 0, Code::Range, "backing_file_size");
    bad("qcow2/backing-name-past-cluster-0", CLUSTER - 4, 8, Code::OutOfFile, "backing_file_offset");
    bad("qcow2/backing-name-past-end", 1 << 40, 8, Code::OutOfFile, "backing_file_offset");
    bad("qcow2/backing-name-offset-max", u64::MAX - 3, 8, Code::OutOfFile, "backing_file_offset");
    bad("qcow2/backing-name-in-header", 8, 8, Code::OutOfFile, "backing_file_offset");
}

fn snapshots(cases: &mut Cases) {
    let snapshots = |count: u32, offset: u64| base().be32(60, count).be64(64, offset);
    cases
        .refuse("qcow2/snapshots-65537", 1, snapshots(65537, 0x50000), Code::TableLimit)
        .field("nb_snapshots", 60);
    cases
        .refuse("qcow2/snapshots-max", 1, snapshots(u32::MAX, 0x50000), Code::TableLimit)
        .field("nb_snapshots", 60);
    cases
        .refuse("qcow2/snapshots-misaligned", 2, snapshots(1, 0x50008), Code::Misaligned)
        .about("snapshots_offset");
    cases
        .refuse("qcow2/snapshots-past-end", 2, snapshots(1, 1 << 40), Code::OutOfFile)
        .about("snapshots_offset");
    cases.refuse("qcow2/snapshots-at-0", 2, snapshots(1, 0), Code::Overlap).about("snapshots_offset");
    // As many as are allowed, all of them zeros in a hole of the file; and names as long as they can be, of bytes
    // that are no text.
    let most = snapshots(65536, 0x60000).cut(0x60000 + 65536 * 40);
    cases.accept("qcow2/snapshots-65536", 6, most, content()).reads(20 << 20);
    let mut long = snapshots(125, 0x60000);
    for i in 0..125 {
        let at = 0x60000 + i * (40 + 16 + 65535 + 65529);
        long = long.put(at, &[0; 12]).put(at + 12, &[0xff, 0xff, 0xff, 0xf9]).be32(at + 36, 16);
        long = long.put(at + 56, &vec![0xff; 65535 + 65529]);
    }
    let end = (long.len + 8).next_multiple_of(CLUSTER);
    cases.accept("qcow2/snapshots-named-in-16m", 6, long.cut(end), content()).reads(20 << 20);
    let entry = |extra: u32| {
        snapshots(1, 0x60000)
            .be64(0x60000, L1)
            .be32(0x60008, 1)
            .be16(0x6000C, 1)
            .be16(0x6000E, 5)
            .be32(0x60024, extra)
            .put(0x60028, &[0; 16])
            .put(0x60038, b"1snap1")
            .cut(0x70000)
    };
    cases.accept("qcow2/snapshot", 8, entry(16), content());
    cases.refuse("qcow2/snapshot-extra-max", 1, entry(u32::MAX), Code::TableLimit);
    cases.refuse("qcow2/snapshot-extra-1025", 1, entry(1025), Code::TableLimit);
    cases.refuse("qcow2/snapshot-l1-max", 1, entry(16).be32(0x60008, u32::MAX), Code::TableLimit);
    cases.refuse("qcow2/snapshot-table-cut", 5, entry(16).cut(0x60020), Code::OutOfFile).or(Code::Truncated);
}

fn odd(cases: &mut Cases) {
    cases.accept("qcow2/healthy", 8, base(), content());
    cases.accept("qcow2/trailing-bytes", 5, base().put(0x60000, &[0x99; 12345]), content());
    let mut v2 = content();
    v2.zeros = vec![0..MIB, MIB + CLUSTER..10 * MIB];
    cases.accept("qcow2/v2", 8, base().be32(4, 2).put(72, &[0; 40]).be64(L2 + 32 * 8, 0), v2);
    cases.accept("qcow2/header-104", 8, base().be32(100, 104), content());
    cases.accept(
        "qcow2/refcount-order-0",
        8,
        base().be32(96, 0).put(REFBLOCK, &[0; 12]).put(REFBLOCK, &[0x3F]),
        content(),
    );
    let mut unaligned = content();
    unaligned.size = 10 * MIB - 1000;
    unaligned.zeros = vec![0..MIB, MIB + CLUSTER..10 * MIB - 1000];
    cases.accept("qcow2/size-unaligned", 8, base().be64(24, 10 * MIB - 1000), unaligned);
    let empty = base().be64(24, 0).be32(36, 0);
    cases.accept("qcow2/no-bytes", 8, empty.clone(), Check::default());
    cases.accept("qcow2/no-bytes-l1-at-0", 8, empty.be64(40, 0), Check::default());
    // 1 EiB in clusters of 2 MiB: an L1 of 16 MiB, all of it a hole of the file.
    let thin = Sparse::zeros(0x60_0000 + (16 << 20))
        .put(0, &base().read(0, 112))
        .be32(20, 21)
        .be64(24, 1 << 60)
        .be32(36, 2 << 20)
        .be64(40, 0x60_0000)
        .be64(48, 0x20_0000)
        .be64(0x20_0000, 0x40_0000);
    let check = Check { size: 1 << 60, data: Vec::new(), zeros: vec![0..1 << 60] };
    cases.accept("qcow2/thin-1e", 8, thin, check).reads(24 << 20);
    cases.accept("qcow2/l1-longer-than-needed", 8, base().be32(36, 100), content());
}
