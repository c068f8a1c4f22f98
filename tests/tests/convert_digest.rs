//! One digest for one disk, whatever format holds it.

use std::process::Command;
use vellum::{ChainOptions, DigestReport, DigestRequest, FilePolicy, Quiet, Vellum};
use vellum_sim::MemoryFiles;
use vellum_tests::disks::{DEMO_SIZE, demo_disk, write_demo};
use vellum_tests::parallel::two_at_a_time;
use vellum_tests::tools::{run_ok, text};
use vellum_tests::variants::VARIANTS;

fn options(format: &str) -> ChainOptions {
    let format = (format == "raw").then(|| "raw".to_owned());
    ChainOptions { format, ..ChainOptions::default() }
}

fn digest(vellum: &Vellum, name: &str, format: &str, flat: bool) -> DigestReport {
    let (disk, _) = vellum.open(name, &options(format)).unwrap();
    let request = DigestRequest { flat, threads: Some(2) };
    vellum.digest(&disk, &request, &Quiet).unwrap()
}

fn digest_of_bytes(bytes: &[u8], flat: bool) -> DigestReport {
    let files = MemoryFiles::new();
    files.put("disk", bytes);
    digest(&Vellum::new(files), "disk", "raw", flat)
}

#[test]
fn one_disk_has_one_digest_in_every_format() {
    let directory = tempfile::tempdir().unwrap();
    let demo = directory.path().join("demo.raw");
    write_demo(&demo);
    let (tree, flat) = (digest_of_bytes(&demo_disk(), false), digest_of_bytes(&demo_disk(), true));
    assert_eq!((tree.algorithm, flat.algorithm), ("vellum-tree-sha256", "sha256"));
    assert_eq!(tree.size, DEMO_SIZE);
    let coreutils = run_ok("sha256sum", "coreutils", &[text(&demo)]);
    assert_eq!(Some(flat.digest.as_str()), coreutils.split(' ').next(), "the flat digest is sha256sum's");
    let local = Vellum::local(FilePolicy::default());
    two_at_a_time(VARIANTS, |variant| {
        let own = directory.path().join(variant.name);
        std::fs::create_dir(&own).unwrap();
        let image = own.join("disk.img");
        let mut request = variant.request(text(&demo), text(&image));
        request.source_options = options("raw");
        local.convert(&request, &Quiet).unwrap();
        let (disk, _) = local.open(text(&image), &options(variant.format)).unwrap();
        if disk.size() == DEMO_SIZE {
            assert_eq!(digest(&local, text(&image), variant.format, false).digest, tree.digest);
            assert_eq!(digest(&local, text(&image), variant.format, true).digest, flat.digest);
        } else {
            // A VHD that is rounded up to a geometry is another disk: longer by zeros.
            assert!(variant.name.starts_with("vhd") && !variant.name.ends_with("exact"));
            let mut longer = demo_disk();
            longer.resize(disk.size() as usize, 0);
            let expected = digest_of_bytes(&longer, false).digest;
            assert_eq!(digest(&local, text(&image), variant.format, false).digest, expected);
            assert_ne!(expected, tree.digest, "the size is part of the disk");
        }
    });
}

#[test]
fn one_bit_makes_another_digest_wherever_it_is() {
    let disk = demo_disk();
    let digest = digest_of_bytes(&disk, false).digest;
    for at in [0usize, 511, 65_535, 65_536, 3 << 20, (8 << 20) + 7, disk.len() - 1] {
        let mut other = disk.clone();
        other[at] ^= 0x80;
        assert_ne!(digest_of_bytes(&other, false).digest, digest, "byte {at}");
        other[at] ^= 0x80;
        assert_eq!(digest_of_bytes(&other, false).digest, digest, "byte {at} put back");
    }
    let zeroes = |len: usize| digest_of_bytes(&vec![0; len], false).digest;
    assert_ne!(zeroes(65_536), zeroes(65_536 * 2));
    assert_ne!(zeroes(512), zeroes(1024));
}

#[test]
fn threads_make_no_difference() {
    let files = MemoryFiles::new();
    files.put("disk", &demo_disk());
    let vellum = Vellum::new(files);
    let (disk, _) = vellum.open("disk", &options("raw")).unwrap();
    let with = |threads| {
        let request = DigestRequest { flat: false, threads: Some(threads) };
        vellum.digest(&disk, &request, &Quiet).unwrap().digest
    };
    assert!((2..9).all(|threads| with(threads) == with(1)));
}

/// The definition in the documentation, in another language, by other hands.
const DEFINITION: &str = r#"
import hashlib, sys
BLOCK = 64 << 10
sha = lambda *parts: hashlib.sha256(b"".join(parts)).digest()
disk = open(sys.argv[1], "rb").read()
leaves = [sha(b"\0", disk[at:at + BLOCK].ljust(BLOCK, b"\0")) for at in range(0, max(len(disk), 1), BLOCK)]
zero = sha(b"\0", bytes(BLOCK))
while len(leaves) & (len(leaves) - 1):
    leaves.append(zero)
while len(leaves) > 1:
    leaves = [sha(b"\1", leaves[i], leaves[i + 1]) for i in range(0, len(leaves), 2)]
print(sha(b"\2", len(disk).to_bytes(8, "little"), leaves[0]).hex())
"#;

#[test]
fn the_digest_is_what_its_documentation_says() {
    let directory = tempfile::tempdir().unwrap();
    for disk in [demo_disk(), vec![0; 512], vec![7; 100_000], vec![1; 3 << 20], vec![0; 5 << 20]] {
        let path = directory.path().join("disk");
        std::fs::write(&path, &disk).unwrap();
        let output = Command::new("/usr/bin/python3").args(["-c", DEFINITION, text(&path)]).output();
        let output = output.expect("python3 is needed for this test (Debian package python3)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = String::from_utf8(output.stdout).unwrap();
        assert_eq!(digest_of_bytes(&disk, false).digest, expected.trim(), "{} bytes", disk.len());
    }
}

#[test]
fn known_digests_stay() {
    // Made by the definition in Python. A change here breaks whoever stored a digest.
    for (disk, expected) in KNOWN {
        assert_eq!(digest_of_bytes(&disk(), false).digest, *expected);
    }
    // And a parent and child have the digest of what the guest sees.
    let files = MemoryFiles::new();
    let child = vellum_tests::chains::Qcow2Image {
        content: vellum_tests::chains::Content::new(1 << 20),
        backing: Some("base"),
        backing_format: Some("raw"),
    };
    files.put("base", &vec![7u8; 1 << 20]);
    files.put("child", &child.build());
    let vellum = Vellum::new(files);
    assert_eq!(digest(&vellum, "child", "qcow2", false).digest, digest(&vellum, "base", "raw", false).digest);
}

type Known = (fn() -> Vec<u8>, &'static str);
const KNOWN: &[Known] = &[
    (|| vec![0; 512], "19437dca9f055a4c550d403abe4bd0c508af01772089e9ccac9ec6649dedfe81"),
    (|| vec![7; 100_000], "dd737cabf2299288a31174f89750c4f7f72195c64786596c975559459d84e129"),
    (
        || (0..3u32 << 20).map(|i| (i % 251) as u8).collect(),
        "188a7bcfdd4577ad2c40f031e3d5c6bf106550d2b94679e71b959380bb4fe796",
    ),
];
