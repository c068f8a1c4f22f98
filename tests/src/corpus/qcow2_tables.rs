//! QCOW2: L1 and L2 entries, compressed clusters, subclusters.

use super::kit::{Cases, Check, Sparse, pattern};
use super::qcow2::{CLUSTER, DATA, L1, L2, REFTABLE, base, content};
use vellum::Code;

const MIB: u64 = 1 << 20;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Entry 16 of the L2 table, for guest byte 1 MiB.
const ENTRY: u64 = L2 + 16 * 8;

/// [`base`] with guest cluster 16 compressed by `payload`, `more` further sectors in its entry.
fn packed(payload: &[u8], more: u64) -> Sparse {
    let file = base().cut(DATA).put(DATA, payload).be64(ENTRY, COMPRESSED | more << 54 | DATA);
    let len = file.len.next_multiple_of(512);
    file.cut(len)
}

fn sectors(payload: &[u8]) -> u64 {
    (payload.len() as u64).div_ceil(512).max(1) - 1
}

fn cluster() -> Vec<u8> {
    let mut cluster = pattern(81, 4096);
    cluster.resize(CLUSTER as usize, 0);
    cluster
}

fn encode(codec: &dyn vellum::Codec, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    assert!(codec.encode(bytes, &mut out, bytes.len() + 1024).expect("encoding"));
    out
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    encode(vellum_codec::deflate(None).expect("the default level").as_ref(), bytes)
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    encode(vellum_codec::zstd(None).expect("the default level").as_ref(), bytes)
}

/// One deflated cluster.
pub(super) fn compressed() -> Sparse {
    let payload = deflate(&cluster());
    packed(&payload, sectors(&payload))
}

/// Extended L2 entries; subclusters 1 and 2 of guest cluster 16 in the file, 3 zero.
pub(super) fn extended() -> Sparse {
    base()
        .be64(72, 1 << 4)
        .put(L2, &[0; 512])
        .be64(L2 + 16 * 16, COPIED | DATA)
        .be64(L2 + 16 * 16 + 8, 0x0000_0008_0000_0006)
        .put(DATA + 2048, &pattern(82, 4096))
}

pub(super) fn add(cases: &mut Cases) {
    l1_entries(cases);
    l2_entries(cases);
    amplified(cases);
    compressed_clusters(cases);
    zstd_clusters(cases);
    subclusters(cases);
}

fn l1_entries(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, base().be64(L1, value), code).field("L1 entry", L1);
    };
    bad(cases, "qcow2/l2-misaligned", COPIED | L2 | 0x200, Code::Misaligned);
    bad(cases, "qcow2/l2-past-end", COPIED | 0x1_0000_0000, Code::OutOfFile);
    bad(cases, "qcow2/l2-at-end", COPIED | 0x60000, Code::OutOfFile);
    bad(cases, "qcow2/l2-highest", COPIED | 0x00FF_FFFF_FFFF_0000, Code::OutOfFile);
    bad(cases, "qcow2/l1-reserved-low", COPIED | L2 | 1, Code::Corrupt);
    bad(cases, "qcow2/l1-reserved-high", COPIED | L2 | 1 << 56, Code::Corrupt);
    bad(cases, "qcow2/l1-entry-max", u64::MAX, Code::Corrupt);
    // Offset 0 is "none", whatever COPIED says: as QEMU reads it.
    let nothing = Check { size: 10 * MIB, data: Vec::new(), zeros: vec![0..10 * MIB] };
    cases.accept("qcow2/l2-at-0-copied", 2, base().be64(L1, COPIED), nothing);
    bad(cases, "qcow2/l2-on-l1", COPIED | L1, Code::Overlap);
    bad(cases, "qcow2/l2-on-refcount-table", COPIED | REFTABLE, Code::Overlap);
}

fn l2_entries(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, base().be64(ENTRY, value), code).field("L2 entry", ENTRY);
    };
    bad(cases, "qcow2/cluster-misaligned", COPIED | DATA | 0x200, Code::Misaligned);
    bad(cases, "qcow2/cluster-past-end", COPIED | 0x1_0000_0000, Code::OutOfFile);
    bad(cases, "qcow2/cluster-at-end", COPIED | 0x60000, Code::OutOfFile);
    bad(cases, "qcow2/cluster-highest", COPIED | 0x00FF_FFFF_FFFF_0000, Code::OutOfFile);
    bad(cases, "qcow2/l2-reserved-low", COPIED | DATA | 2, Code::Corrupt);
    bad(cases, "qcow2/l2-reserved-high", COPIED | DATA | 1 << 61, Code::Corrupt);
    let nothing = Check { size: 10 * MIB, data: Vec::new(), zeros: vec![0..10 * MIB] };
    cases.accept("qcow2/cluster-at-0-copied", 2, base().be64(ENTRY, COPIED), nothing);
    bad(cases, "qcow2/cluster-on-l1", COPIED | L1, Code::Overlap);
    bad(cases, "qcow2/cluster-on-own-table", COPIED | L2, Code::Overlap);
    cases
        .refuse("qcow2/v2-zero-flag", 4, base().be32(4, 2).put(72, &[0; 40]), Code::Corrupt)
        .field("L2 entry", L2 + 32 * 8);
    let mut twice = content();
    twice.data.push((0, pattern(80, 4096)));
    twice.zeros.remove(0);
    cases.accept("qcow2/cluster-twice", 2, base().be64(L2, DATA), twice);
    cases.accept("qcow2/zero-with-preallocation", 8, base().be64(L2 + 32 * 8, COPIED | DATA | 1), content());
    let mut same = Check { size: 600 * MIB, ..content() };
    same.data.push((512 * MIB + MIB, pattern(80, 4096)));
    same.zeros.truncate(1);
    cases.accept(
        "qcow2/l2-shared-by-two-entries",
        2,
        base().be64(24, 600 * MIB).be32(36, 2).be64(L1 + 8, L2),
        same,
    );
}

/// Few bytes that stand for very many entries: one L2 table for every entry of an L1 of 16 MiB. No call may go through
/// all of them.
fn amplified(cases: &mut Cases) {
    let entries = 2u64 << 20;
    let l1 = (COPIED | 0x1_0000).to_be_bytes().repeat(entries as usize);
    let file = base()
        .cut(0x4_0000)
        .be64(24, entries << 29)
        .be32(36, entries as u32)
        .be64(40, 0x10_0000)
        .be64(48, 0x2_0000)
        .put(0x1_0000, &[0; 16])
        .put(0x10_0000, &l1);
    let check = Check { size: entries << 29, data: Vec::new(), zeros: Vec::new() };
    cases.accept("qcow2/one-l2-for-all", 6, file, check);
}

fn compressed_clusters(cases: &mut Cases) {
    let good = deflate(&cluster());
    let mut check = content();
    check.data = vec![(MIB, cluster())];
    check.zeros = vec![0..MIB, 2 * MIB..10 * MIB];
    cases.accept("qcow2/compressed-healthy", 8, compressed(), check.clone());
    let bad = |cases: &mut Cases, name: &str, payload: &[u8], more: u64| {
        cases.refuse(name, 6, packed(payload, more), Code::Decompress);
    };
    let bomb = deflate(&vec![0u8; 16 << 20]);
    bad(cases, "qcow2/deflate-bomb", &bomb, sectors(&bomb));
    let short = deflate(&[7u8; 1000]);
    bad(cases, "qcow2/deflate-short", &short, sectors(&short));
    let long = deflate(&vec![7u8; CLUSTER as usize + 1]);
    bad(cases, "qcow2/deflate-one-byte-too-long", &long, sectors(&long));
    bad(cases, "qcow2/deflate-garbage", &[0xff; 512], 0);
    bad(cases, "qcow2/deflate-zeros", &[0; 1024], 1);
    let noise = deflate(
        &pattern(1, 60)
            .iter()
            .cycle()
            .take(65536)
            .enumerate()
            .map(|(i, b)| b ^ (i * i / 97) as u8)
            .collect::<Vec<_>>(),
    );
    bad(cases, "qcow2/deflate-cut-by-length", &noise, 0);
    bad(cases, "qcow2/deflate-framed-as-zlib", &super::vmdk::zlib(&cluster()), 0);
    // Offset and length of a compressed cluster against the file.
    let entry = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, compressed().be64(ENTRY, value), code).field("L2 entry", ENTRY);
    };
    entry(cases, "qcow2/compressed-past-end", COMPRESSED | 1 << 40, Code::OutOfFile);
    entry(cases, "qcow2/compressed-highest", COMPRESSED | ((1 << 54) - 1), Code::OutOfFile);
    // Writers must not set COPIED here; it says nothing about reading.
    let copied = COPIED | COMPRESSED | sectors(&good) << 54 | DATA;
    cases.accept("qcow2/compressed-copied", 4, compressed().be64(ENTRY, copied), check.clone());
    entry(cases, "qcow2/compressed-in-header", COMPRESSED | 512, Code::Overlap);
    // The length is an upper bound; the last sector may be cut short by the end of the file.
    cases.accept(
        "qcow2/compressed-last-sector-partial",
        8,
        {
            let file = packed(&good, sectors(&good));
            file.cut(DATA + good.len() as u64)
        },
        check.clone(),
    );
    cases
        .refuse(
            "qcow2/compressed-length-past-end",
            1,
            compressed().be64(ENTRY, COMPRESSED | 0xFF << 54 | DATA),
            Code::OutOfFile,
        )
        .field("L2 entry", ENTRY);
    check.data = vec![(MIB, cluster()), (0, cluster())];
    check.zeros = vec![2 * MIB..10 * MIB];
    let twice = compressed().be64(L2, COMPRESSED | sectors(&good) << 54 | DATA);
    cases.accept("qcow2/compressed-twice", 2, twice, check);
}

fn zstd_clusters(cases: &mut Cases) {
    let image = |payload: &[u8]| packed(payload, sectors(payload)).be64(72, 1 << 3).put(104, &[1]);
    let mut check = content();
    check.data = vec![(MIB, cluster())];
    check.zeros = vec![0..MIB, 2 * MIB..10 * MIB];
    cases.accept("qcow2/zstd-healthy", 8, image(&zstd(&cluster())), check.clone());
    let two = [zstd(&cluster()[..1000]), zstd(&cluster()[1000..])].concat();
    cases.accept("qcow2/zstd-two-frames", 8, image(&two), check);
    cases.refuse("qcow2/zstd-bomb", 6, image(&zstd(&vec![0u8; 64 << 20])), Code::Decompress);
    cases.refuse("qcow2/zstd-short", 6, image(&zstd(&[7; 100])), Code::Decompress);
    cases.refuse(
        "qcow2/zstd-garbage",
        6,
        image(&[0x28, 0xB5, 0x2F, 0xFD, 0xff, 0xff, 0xff, 0xff]),
        Code::Decompress,
    );
    // A frame of its own that declares a window of 2 GiB: must not allocate it.
    let window = [0x28, 0xB5, 0x2F, 0xFD, 0x00, 0xA8, 0x01, 0x00, 0x00];
    cases.refuse("qcow2/zstd-window-2g", 6, image(&window), Code::Decompress);
    let skippable: Vec<u8> = [0x50, 0x2A, 0x4D, 0x18, 0, 0, 0, 0].repeat(64);
    cases.refuse("qcow2/zstd-skippable-frames-only", 6, image(&skippable), Code::Decompress);
    let empty: Vec<u8> = zstd(&[]).repeat(50);
    cases.refuse("qcow2/zstd-empty-frames", 6, image(&empty), Code::Decompress);
}

fn subclusters(cases: &mut Cases) {
    let entry = L2 + 16 * 16;
    let data = vec![(MIB + 2048, pattern(82, 4096 - 2048 + 2048))];
    let check = Check { size: 10 * MIB, data, zeros: vec![0..MIB, MIB + 6144..10 * MIB] };
    cases.accept("qcow2/extended-l2", 8, extended(), check);
    let bad = |cases: &mut Cases, name: &str, first: u64, bitmap: u64, code| {
        cases.refuse(name, 2, extended().be64(entry, first).be64(entry + 8, bitmap), code).about("L2");
    };
    bad(cases, "qcow2/subcluster-allocated-and-zero", COPIED | DATA, 0x0000_0002_0000_0002, Code::Corrupt);
    bad(cases, "qcow2/subcluster-without-cluster", 0, 2, Code::Corrupt);
    bad(cases, "qcow2/extended-with-zero-flag", COPIED | DATA | 1, 2, Code::Corrupt);
    bad(cases, "qcow2/extended-past-end", COPIED | 1 << 40, 2, Code::OutOfFile);
}
