//! Power losses at every flush of random work: what was flushed is there, and `check` finds leaks at most.

use std::sync::Arc;
use vellum_conformance::format::Recipe;
use vellum_conformance::writing::create;
use vellum_core::{
    Access, Asker, Buf, ChainOptions, CheckRequest, Disk, Events, FlushPoint, Format, FormatRegistry, Limits,
    Location, OpenFlags, Providers, Storage, WriteAccess, WriteFlags, ZeroMode, block_on, mutation,
};
use vellum_format_qcow2::Qcow2;
use vellum_format_raw::Raw;
use vellum_sim::{
    Content, Crash, Depth, Fault, FileSet, MemoryFiles, Oracle, Random, RequestKind, SimFiles, Tag, hash_of,
    masks, sector_bytes,
};

const SIZE: u64 = 96 << 10;

fn registry() -> FormatRegistry {
    FormatRegistry::new(vec![Arc::new(Qcow2), Arc::new(Raw)])
}

fn open(files: &Arc<SimFiles>, write: WriteAccess) -> Disk {
    let mut options = ChainOptions {
        write,
        events: Events::new(|_| ()),
        providers: Some(Providers::seeded(1, 1)),
        ..ChainOptions::default()
    };
    options.disk.flags = OpenFlags { discard: true, ..OpenFlags::default() };
    block_on(registry().open_chain(&files.resolver(), "disk.img", &options)).expect("the image opens").0
}

/// The image as QEMU or we made it, and what the disk holds.
fn start(options: &[(&str, &str)]) -> FileSet {
    let files = MemoryFiles::new();
    let options =
        options.iter().map(|(n, v)| (n.to_string().leak() as &'static str, v.to_string())).collect();
    let format: Arc<dyn Format> = Arc::new(Qcow2);
    let recipe = Recipe { options, ..Recipe::default() };
    create(&format, &files, "disk.img", &recipe, SIZE, None).unwrap();
    let mut set = FileSet::default();
    for path in files.paths() {
        set.put(&path, Content::from_bytes(&files.get(&path).unwrap().to_vec()));
    }
    set
}

/// Does random work and notes it. Failures are noted, too: a fault may be armed.
fn work(files: &Arc<SimFiles>, oracle: &mut Oracle, seed: u64, count: usize) {
    let disk = open(files, WriteAccess::Yes);
    let mut random = Random::new(seed);
    for number in 0..count {
        let sectors = SIZE / 512;
        let first = random.below(sectors);
        let len = [1, 2, 8, 17][random.index(4)].min(sectors - first);
        let range = first * 512..(first + len) * 512;
        let kind = match random.below(10) {
            0..=4 => {
                let data: Vec<u8> =
                    (first..first + len).flat_map(|s| sector_bytes(s, number as u64)).collect();
                RequestKind::Write { offset: range.start, data: data.into(), fua: false }
            }
            5 => RequestKind::Zero(range),
            6..=7 => RequestKind::Discard(range),
            _ => RequestKind::Flush,
        };
        request(files, oracle, &disk, kind);
    }
    let request = oracle.begin(RequestKind::Flush, files.now());
    files.guest_begins(request);
    let is_ok = disk.close().wait().is_ok();
    oracle.end(request, files.guest_ends(request, is_ok), is_ok);
}

fn request(files: &Arc<SimFiles>, oracle: &mut Oracle, disk: &Disk, kind: RequestKind) {
    let request = oracle.begin(kind.clone(), files.now());
    files.guest_begins(request);
    let result = match kind {
        RequestKind::Write { offset, data, .. } => {
            disk.write(Buf::copy_of(&data), offset, WriteFlags::default()).wait().1
        }
        RequestKind::Zero(range) => disk.write_zeroes(range, ZeroMode::MayUnmap).wait(),
        RequestKind::Discard(range) => disk.discard_range(range).wait(),
        RequestKind::Flush => disk.flush_all().wait(),
    };
    oracle.end(request, files.guest_ends(request, result.is_ok()), result.is_ok());
}

fn view(disk: &Disk) -> Vec<u64> {
    let (buf, result) = disk.read_at(Buf::zeroed(disk.size() as usize), 0).wait();
    result.expect("the disk reads");
    buf.chunks(512).map(hash_of).collect()
}

fn errors(files: &Arc<SimFiles>) -> u64 {
    let storage = files.resolver().open("disk.img", &Asker::User, Access::default()).wait().unwrap().storage;
    let request = CheckRequest {
        storage,
        location: Location("disk.img".into()),
        resolver: files.resolver(),
        limits: Limits::default(),
        events: Events::new(|_| ()),
        plan: false,
    };
    let report = block_on(Qcow2.check(request)).expect("the image can be checked");
    if report.errors > 0 {
        for finding in &report.findings {
            eprintln!("    {:?} {} {:?}", finding.severity, finding.message, finding.offset);
        }
    }
    report.errors
}

/// Random work on a disk that is empty at first, and a crash at every flush; returns the number of states looked at.
fn crash_everywhere(set: &FileSet, base: Content, seed: u64, count: usize, samples: usize) -> usize {
    crash_during(set, base, seed, samples, None, 1, |files, oracle| work(files, oracle, seed, count))
}

/// `stride`: only every so many states one is looked at.
fn crash_during(
    set: &FileSet,
    base: Content,
    seed: u64,
    samples: usize,
    fault: Option<Fault>,
    stride: usize,
    work: impl FnOnce(&Arc<SimFiles>, &mut Oracle),
) -> usize {
    let files = SimFiles::new(set.clone());
    let mut oracle = Oracle::new(base);
    files.arm(fault);
    work(&files, &mut oracle);
    let trace = files.trace();
    let mut random = Random::new(seed ^ 0xc0ffee);
    let mut states = 0;
    let moments = match fault {
        None => Crash::moments(&trace),
        Some(_) => vec![trace.events.len()],
    };
    for cut in moments {
        let crash = Crash::at(&trace, set, cut);
        let allowed = oracle.after_crash(cut);
        let what = format!("seed {seed} cut {cut} fault {:?}", fault.map(|f| f.to_string()));
        let masks = masks(&crash.members, Depth { exhaustive: 5, samples }, &mut random);
        for mask in masks.into_iter().step_by(stride) {
            states += 1;
            let after = SimFiles::new(crash.state(&mask));
            let seen = view(&open(&after, WriteAccess::No));
            if let Some(sector) = allowed.violation(&seen) {
                let (found, _) = open(&after, WriteAccess::No).read_at(Buf::zeroed(512), sector * 512).wait();
                let found = Tag::of(&found).map_or(format!("{:?}", &found[..24]), |tag| tag.to_string());
                panic!("{what}: sector {sector} is wrong: {found}\n{}", crash.explain(&mask));
            }
            assert_eq!(errors(&after), 0, "{what}\n{}", crash.explain(&mask));
            if states % 7 == 0 {
                go_on(&after, &seen);
                assert_eq!(errors(&after), 0, "after going on: {what}\n{}", crash.explain(&mask));
            }
        }
    }
    states
}

/// The image is written again after the crash; what it held stays.
fn go_on(files: &Arc<SimFiles>, seen: &[u64]) {
    let disk = open(files, WriteAccess::Yes);
    let mut expected = seen.to_vec();
    for sector in [0u64, 40, 41, 100, 150] {
        let bytes = sector_bytes(sector, 77_777);
        disk.write(Buf::copy_of(&bytes), sector * 512, WriteFlags::default()).wait().1.unwrap();
        expected[sector as usize] = hash_of(&bytes);
    }
    disk.close().wait().unwrap();
    assert!(view(&open(files, WriteAccess::No)) == expected, "going on after the crash");
}

#[test]
fn power_losses_lose_nothing_that_was_flushed() {
    let mut states = 0;
    for (options, seeds) in [
        (&[("cluster_size", "512")][..], 1),
        (&[("cluster_size", "512"), ("refcount_bits", "64")], 1),
        (&[("cluster_size", "4096")], 1),
        (&[("cluster_size", "65536")], 1),
        (&[("cluster_size", "16384"), ("extended_l2", "on")], 1),
        (&[("cluster_size", "4096"), ("compat", "v2")], 1),
        (&[("cluster_size", "4096"), ("data_file", "disk.data")], 1),
        (&[("cluster_size", "4096"), ("data_file", "disk.data"), ("data_file_raw", "on")], 1),
    ] {
        let set = start(options);
        for seed in 0..seeds {
            states += crash_everywhere(&set, Content::from_bytes(&vec![0; SIZE as usize]), seed, 60, 12);
        }
    }
    println!("{states} crash states");
}

#[test]
fn power_losses_in_an_image_with_a_snapshot_and_compressed_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let run = |line: &str| {
        let mut words = line.split_whitespace();
        let output =
            std::process::Command::new(words.next().unwrap()).args(words).current_dir(dir.path()).output();
        assert!(output.unwrap().status.success(), "{line}");
    };
    let content: Vec<u8> = (0..SIZE as usize).map(|i| (i / 512 % 251) as u8 | 1).collect();
    std::fs::write(dir.path().join("content.raw"), &content).unwrap();
    let mut states = 0;
    for options in [
        "-c -o cluster_size=4k",
        "-o cluster_size=4k,refcount_bits=8",
        "-c -o cluster_size=16k,extended_l2=on",
    ] {
        run(&format!("qemu-img convert -f raw -O qcow2 {options} content.raw disk.img"));
        run("qemu-img snapshot -c first disk.img");
        let mut set = FileSet::default();
        set.put("disk.img", Content::from_bytes(&std::fs::read(dir.path().join("disk.img")).unwrap()));
        for seed in 0..1 {
            states += crash_everywhere(&set, Content::from_bytes(&content), seed, 40, 12);
        }
    }
    println!("{states} crash states");
}

#[test]
fn power_losses_while_the_refcount_table_grows() {
    // A block counts 32 KiB, a table of one cluster 2 MiB: filled up to just below that.
    const BIG: u64 = 2304 << 10;
    let files = MemoryFiles::new();
    let format: Arc<dyn Format> = Arc::new(Qcow2);
    let recipe = Recipe::options(&[("cluster_size", "512"), ("refcount_bits", "64")]);
    create(&format, &files, "disk.img", &recipe, BIG, None).unwrap();
    let mut base = Content::default();
    base.grow(BIG);
    let mut set = FileSet::default();
    set.put("disk.img", Content::from_bytes(&files.get("disk.img").unwrap().to_vec()));
    let prepared = SimFiles::new(set);
    let disk = open(&prepared, WriteAccess::Yes);
    for piece in 0..28u64 {
        let bytes = vec![piece as u8 | 1; 64 << 10];
        base.write(&bytes, piece << 16);
        disk.write(Buf::copy_of(&bytes), piece << 16, WriteFlags::default()).wait().1.unwrap();
    }
    disk.close().wait().unwrap();
    let set = prepared.snapshot();
    let before = set.get("disk.img").unwrap().to_vec()[48..60].to_vec();
    let states = crash_during(&set, base, 3, 2, None, 11, |files, oracle| {
        let disk = open(files, WriteAccess::Yes);
        for piece in 0..10u64 {
            let at = (28 << 16) + piece * 24_576;
            let data: Vec<u8> = (at / 512..at / 512 + 48).flat_map(|s| sector_bytes(s, piece)).collect();
            let kind = RequestKind::Write { offset: at, data: data.into(), fua: false };
            request(files, oracle, &disk, kind);
            if piece % 3 == 2 {
                request(files, oracle, &disk, RequestKind::Flush);
            }
        }
        disk.close().wait().unwrap();
        let after = files.snapshot().get("disk.img").unwrap().to_vec()[48..60].to_vec();
        assert_ne!(before, after, "the table has grown");
    });
    println!("{states} crash states");
}

#[test]
fn whatever_fails_the_image_stays_sound() {
    let mut states = 0;
    for options in [&[("cluster_size", "512"), ("refcount_bits", "64")][..], &[("cluster_size", "4096")]] {
        let set = start(options);
        for (kind, step) in [("nospace.once", 3), ("io.once", 5), ("short.once", 5), ("nospace.ever", 7)] {
            for nth in (0..120).step_by(step) {
                let fault = Fault::parse(&format!("change.{nth}.{kind}"));
                assert!(fault.is_some());
                let base = Content::from_bytes(&vec![0; SIZE as usize]);
                states +=
                    crash_during(&set, base, nth, 2, fault, 1, |files, oracle| work(files, oracle, nth, 40));
            }
        }
    }
    println!("{states} crash states");
}

#[test]
fn every_flush_is_missed_when_it_is_left_out() {
    for point in [FlushPoint::Data, FlushPoint::Tables, FlushPoint::Other] {
        // The usual order needs no other flushes; growing refcounts do.
        let options: &[(&str, &str)] = match point {
            FlushPoint::Other => &[("cluster_size", "512"), ("refcount_bits", "64")],
            _ => &[("cluster_size", "4096")],
        };
        let set = start(options);
        let noticed = (0..4).any(|seed| {
            mutation::leave_out(Some(point));
            let crashed = std::panic::catch_unwind(|| {
                crash_everywhere(&set, Content::from_bytes(&vec![0; SIZE as usize]), seed, 60, 12)
            });
            mutation::leave_out(None);
            crashed.is_err()
        });
        assert!(noticed, "{point:?}");
    }
}

/// The session's flush: a bitmap that is trusted must know of every change.
fn stale_bitmaps(left_out: Option<FlushPoint>) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img").display().to_string();
    for words in [
        &["create", "-f", "qcow2", "-o", "preallocation=full", &path, "1M"][..],
        &["bitmap", "--add", &path, "b0"],
    ] {
        assert!(std::process::Command::new("qemu-img").args(words).output().unwrap().status.success());
    }
    let mut set = FileSet::default();
    set.put("disk.img", Content::from_bytes(&std::fs::read(&path).unwrap()));
    let files = SimFiles::new(set.clone());
    mutation::leave_out(left_out);
    let disk = open(&files, WriteAccess::Yes);
    disk.write(Buf::copy_of(&[7; 512]), 0, WriteFlags::default()).wait().1.unwrap();
    mutation::leave_out(None);
    let trace = files.trace();
    let crash = Crash::at(&trace, &set, trace.events.len());
    let masks = masks(&crash.members, Depth { exhaustive: 8, samples: 0 }, &mut Random::new(1));
    let stale = masks.iter().filter(|mask| {
        let after = SimFiles::new(crash.state(mask));
        let disk = open(&after, WriteAccess::No);
        let is_changed = view(&disk)[0] != 0;
        let info = disk.layers()[0].image.info().clone();
        let is_trusted = format!("{:?}", info.properties).contains("(\"in_use\", Flag(false))");
        is_changed && is_trusted
    });
    stale.count()
}

#[test]
fn bitmaps_are_marked_before_the_first_change_is_durable() {
    assert_eq!(stale_bitmaps(None), 0);
    assert!(stale_bitmaps(Some(FlushPoint::Session)) > 0, "the flush is needed");
}
