//! What other tools write, we read; what we write, other tools read.

use std::path::{Path, PathBuf};
use vellum::{ChainOptions, ConvertRequest, FilePolicy, Quiet, Vellum};
use vellum_tests::disks::{DEMO_SIZE, demo_disk, difference, write_demo};
use vellum_tests::parallel::two_at_a_time;
use vellum_tests::tools::{
    libyal_digest, qemu_image, qemu_img, qemu_img_in, qemu_io, qemu_to_raw, run_ok, text,
};
use vellum_tests::variants::{VARIANTS, Variant, variant};

/// Format, options and whether compressed, in the words of `qemu-img`: every variant that it writes.
const QEMU_WRITES: &[(&str, &str, bool)] = &[
    ("raw", "", false),
    ("vdi", "", false),
    ("vdi", "static=on", false),
    ("vpc", "subformat=dynamic", false),
    ("vpc", "subformat=dynamic,force_size=on", false),
    ("vpc", "subformat=fixed", false),
    ("vpc", "subformat=fixed,force_size=on", false),
    ("vmdk", "subformat=monolithicSparse", false),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on", false),
    ("vmdk", "subformat=monolithicSparse,compat6=on,adapter_type=lsilogic", false),
    ("vmdk", "subformat=monolithicFlat", false),
    ("vmdk", "subformat=twoGbMaxExtentSparse", false),
    ("vmdk", "subformat=twoGbMaxExtentFlat", false),
    ("vmdk", "subformat=streamOptimized", false),
    ("qcow2", "compat=0.10", false),
    ("qcow2", "compat=0.10", true),
    ("qcow2", "compat=1.1", false),
    ("qcow2", "compat=1.1", true),
    ("qcow2", "compression_type=zstd", true),
    ("qcow2", "extended_l2=on", false),
    ("qcow2", "extended_l2=on,cluster_size=16k", false),
    ("qcow2", "extended_l2=on", true),
    ("qcow2", "cluster_size=512", false),
    ("qcow2", "cluster_size=512", true),
    ("qcow2", "cluster_size=2M", false),
    ("qcow2", "cluster_size=2M", true),
    ("qcow2", "cluster_size=4k,compression_type=zstd", true),
    ("qcow2", "refcount_bits=1", false),
    ("qcow2", "refcount_bits=64,lazy_refcounts=on", false),
    ("qcow2", "preallocation=metadata", false),
    ("qcow2", "preallocation=full", false),
    ("qcow2", "data_file=disk.data", false),
    ("qcow2", "data_file=disk.data,data_file_raw=on", false),
];

fn local() -> Vellum {
    Vellum::local(FilePolicy::default())
}

fn own_directory(directory: &Path, name: &str) -> PathBuf {
    let own = directory.join(name);
    std::fs::create_dir(&own).unwrap();
    own
}

/// The content of an image, as we convert it to raw.
fn as_raw(image: &Path, format: Option<&str>) -> Vec<u8> {
    let raw = image.with_extension("as-raw");
    let mut request = ConvertRequest::new(text(image), text(&raw), "raw");
    request.source_options.format = format.map(str::to_owned);
    request.threads = Some(1);
    local().convert(&request, &Quiet).unwrap_or_else(|e| panic!("{}: {e:?}", image.display()));
    std::fs::read(&raw).unwrap()
}

#[test]
fn what_qemu_writes_converts_to_the_same_raw_disk() {
    let directory = tempfile::tempdir().unwrap();
    let demo = directory.path().join("demo.raw");
    write_demo(&demo);
    let truth = demo_disk();
    two_at_a_time(QEMU_WRITES, |(format, options, compress)| {
        let name = format!("{format}-{options}-{compress}").replace(['/', ','], "_");
        let own = own_directory(directory.path(), &name);
        let image = own.join("disk.img");
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if *compress {
            args.push("-c");
        }
        args.extend([text(&demo), text(&image)]);
        qemu_img_in(&own, &args);
        let content = as_raw(&image, (*format == "raw").then_some("raw"));
        assert!(content.len() as u64 >= DEMO_SIZE);
        assert_eq!(difference(&content, &truth), None, "first differing byte");
        // And what QEMU itself makes of it is as long.
        let theirs = own.join("theirs.raw");
        qemu_to_raw(&image, format, &theirs);
        assert_eq!(content.len() as u64, std::fs::metadata(&theirs).unwrap().len(), "size of the disk");
        std::fs::remove_dir_all(own).unwrap();
    });
}

#[test]
fn images_that_a_guest_wrote_to_through_qemu_read_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let formats = ["vdi", "vpc", "vmdk", "qcow2"];
    let options = ["", "", "zeroed_grain=on", "extended_l2=on"];
    let cases: Vec<(&str, &str)> = formats.into_iter().zip(options).collect();
    two_at_a_time(&cases, |(format, options)| {
        let own = own_directory(directory.path(), format);
        let (image, theirs) = (own.join("disk.img"), own.join("theirs.raw"));
        let mut create = vec!["create", "-f", format];
        if !options.is_empty() {
            create.extend(["-o", options]);
        }
        create.extend([text(&image), "30M"]);
        qemu_img(&create);
        // Out of order, across blocks, in small pieces, over one another, made zero again.
        qemu_io(
            format,
            &image,
            &[
                "write -P 1 20M 70k",
                "write -P 2 512 512",
                "write -P 3 4095k 9k",
                "write -P 4 20500k 1k",
                "write -z 20M 64k",
                "write -P 5 9M 3M",
                "write -z 10M 1M",
                "write -P 6 10M 512",
                "write -P 7 31457024 256",
            ],
        );
        qemu_to_raw(&image, format, &theirs);
        let (ours, theirs) = (as_raw(&image, None), std::fs::read(&theirs).unwrap());
        assert_eq!(ours.len(), theirs.len());
        assert_eq!(difference(&ours, &theirs), None, "first differing byte");
        assert!(ours[9 << 20..10 << 20].iter().all(|byte| *byte == 5), "the test wrote what it thinks");
    });
}

#[test]
fn qemu_snapshots_do_not_disturb_the_active_disk() {
    let directory = tempfile::tempdir().unwrap();
    let (image, theirs) = (directory.path().join("disk.qcow2"), directory.path().join("theirs.raw"));
    qemu_img(&["create", "-f", "qcow2", text(&image), "20M"]);
    qemu_io("qcow2", &image, &["write -P 1 1M 2M"]);
    qemu_img(&["snapshot", "-c", "first", text(&image)]);
    qemu_io("qcow2", &image, &["write -P 2 2M 2M", "write -z 1M 512k"]);
    qemu_img(&["bitmap", "--add", text(&image), "bitmap0"]);
    qemu_to_raw(&image, "qcow2", &theirs);
    assert_eq!(difference(&as_raw(&image, None), &std::fs::read(&theirs).unwrap()), None);
}

/// Our image of the demonstration disk.
fn write_variant(directory: &Path, demo: &Path, variant: &Variant) -> PathBuf {
    let own = own_directory(directory, variant.name);
    // libyal finds extents by the names in the descriptor; the extension is what people would give it.
    let image = own.join(format!("disk.{}", variant.format));
    let mut request = variant.request(text(demo), text(&image));
    request.source_options = ChainOptions { format: Some("raw".into()), ..ChainOptions::default() };
    local().convert(&request, &Quiet).unwrap_or_else(|e| panic!("writing {}: {e:?}", variant.name));
    image
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn qemu_reads_and_checks_what_we_write() {
    let directory = tempfile::tempdir().unwrap();
    let demo = directory.path().join("demo.raw");
    write_demo(&demo);
    let truth = demo_disk();
    two_at_a_time(VARIANTS, |variant| {
        let image = write_variant(directory.path(), &demo, variant);
        let raw = image.with_extension("theirs");
        qemu_to_raw(&image, variant.qemu, &raw);
        let content = std::fs::read(&raw).unwrap();
        assert_eq!(difference(&content, &truth), None, "first differing byte");
        // What Vellum says of the size is what QEMU sees.
        let ours = local().open_alone(text(&image), &raw_only(variant)).unwrap();
        assert_eq!(content.len() as u64, ours.layer.image.info().virtual_size);
        if !variant.name.starts_with("vhd") {
            assert_eq!(content.len() as u64, DEMO_SIZE);
        }
        if matches!(variant.qemu, "qcow2" | "vdi") {
            let check = qemu_img(&["check", "--image-opts", &qemu_image(&image, variant.qemu)]);
            assert!(check.contains("No errors were found"), "{check}");
        }
        if variant.qemu == "vmdk" && !variant.name.contains("flat") && variant.name != "vmdk-vmfs" {
            let check = qemu_img(&["check", "-f", "vmdk", text(&image)]);
            assert!(check.contains("No errors were found"), "{check}");
        }
        // Without being told the format, QEMU recognises it too. A fixed VHD has nothing at its head to recognise.
        if !variant.name.starts_with("vhd-fixed") {
            let info = qemu_img(&["info", "--output=json", text(&image)]);
            assert!(info.contains(&format!("\"format\": \"{}\"", variant.qemu)), "{info}");
        }
    });
}

fn raw_only(variant: &Variant) -> ChainOptions {
    let format = (variant.format == "raw").then(|| "raw".to_owned());
    ChainOptions { format, ..ChainOptions::default() }
}

#[test]
fn libyal_reads_what_we_write() {
    let directory = tempfile::tempdir().unwrap();
    let demo = directory.path().join("demo.raw");
    write_demo(&demo);
    let readable: Vec<Variant> = VARIANTS.iter().copied().filter(|v| v.libyal.is_some()).collect();
    assert!(readable.len() > 10);
    two_at_a_time(&readable, |variant| {
        let image = write_variant(directory.path(), &demo, variant);
        let (size, digest) = libyal_digest(variant.libyal.unwrap(), &image);
        assert!(size >= DEMO_SIZE, "libyal sees {size} bytes");
        let mut truth = demo_disk();
        truth.resize(size as usize, 0);
        assert_eq!(digest, sha256(&truth), "content as libyal sees it");
    });
}

#[test]
fn libyal_tells_the_same_of_our_images_as_we_do() {
    let directory = tempfile::tempdir().unwrap();
    let demo = directory.path().join("demo.raw");
    write_demo(&demo);
    for (name, program, expected) in [
        ("vmdk-sparse", "vmdkinfo", &["Disk type", "sparse"][..]),
        ("vmdk-flat", "vmdkinfo", &["Disk type", "flat"]),
        ("vmdk-stream", "vmdkinfo", &["Disk type", "optimized"]),
        ("vmdk-split-sparse", "vmdkinfo", &["Disk type"]),
        ("vhd-dynamic-exact", "vhdiinfo", &["Disk type", ": Dynamic"]),
        ("vhd-fixed-exact", "vhdiinfo", &["Disk type", ": Fixed"]),
        ("qcow2-v2", "qcowinfo", &["Format version", ": 2"]),
        ("qcow2-v3", "qcowinfo", &["Format version", ": 3"]),
    ] {
        let image = write_variant(directory.path(), &demo, &variant(name));
        let package = match program {
            "vmdkinfo" => "libvmdk-utils",
            "vhdiinfo" => "libvhdi-utils",
            _ => "libqcow-utils",
        };
        let out = run_ok(program, package, &[text(&image)]);
        for word in expected {
            assert!(out.to_lowercase().contains(&word.to_lowercase()), "{name}: no {word:?} in\n{out}");
        }
        assert!(out.contains(&DEMO_SIZE.to_string()), "{name}: size {DEMO_SIZE} not in\n{out}");
    }
}
