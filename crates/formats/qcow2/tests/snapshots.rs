//! Internal snapshots, made and used by us and by QEMU in turn, with every content compared.

mod tools;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tools::{Random, qemu_check, run};
use vellum_conformance::format::{open_with, read_all};
use vellum_core::{
    Buf, ChainOptions, Code, Events, Format, Image, Limits, Location, OpenRequest, Providers, Result,
    Storage, WriteAccess, block_on,
};
use vellum_format_qcow2::Qcow2;
use vellum_sim::MemoryFiles;

const SIZE: usize = 4 << 20;

fn request(files: &Arc<MemoryFiles>, write: bool, snapshot: Option<&str>) -> OpenRequest {
    OpenRequest {
        storage: files.get("t.qcow2").unwrap(),
        location: Location("t.qcow2".into()),
        resolver: files.clone(),
        limits: Limits::default(),
        events: Events::default(),
        open_parts: true,
        write,
        access: vellum_core::Access::default(),
        skip_consistency_checks: false,
        snapshot: snapshot.map(str::to_owned),
        providers: Providers::seeded(1, 1_700_000_000),
    }
}

fn load(dir: &Path) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put("t.qcow2", &std::fs::read(dir.join("t.qcow2")).unwrap());
    files
}

/// Does something with our driver in a session of its own, on the file in `dir`.
fn ours<T>(dir: &Path, what: impl AsyncFnOnce(&dyn Image) -> Result<T>) -> Result<T> {
    let files = load(dir);
    let result = block_on(async {
        let image = Qcow2.open(request(&files, true, None)).await?;
        let writable = image.writable().expect("opened for writing");
        writable.begin().await?;
        let result = what(image.as_ref()).await?;
        writable.close().await?;
        Ok(result)
    });
    std::fs::write(dir.join("t.qcow2"), files.get("t.qcow2").unwrap().to_vec()).unwrap();
    result
}

fn create(dir: &Path, name: &str) -> String {
    ours(dir, async |image| image.snapshots().unwrap().create(name.into(), 1_700_000_000).await).unwrap().id
}

fn list(dir: &Path) -> Vec<(String, String)> {
    let files = load(dir);
    let image = block_on(Qcow2.open(request(&files, false, None))).unwrap();
    let list = block_on(image.snapshots().unwrap().list()).unwrap();
    list.into_iter().map(|info| (info.id, info.name)).collect()
}

/// The disk, or a snapshot of it, as QEMU and as we read it.
fn content(dir: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let from = snapshot.map(|name| format!("-l snapshot.name={name}")).unwrap_or_default();
    run(dir, &format!("qemu-img convert -f qcow2 -O raw {from} t.qcow2 t.raw"));
    let theirs = std::fs::read(dir.join("t.raw")).unwrap();
    let options = ChainOptions { snapshot: snapshot.map(str::to_owned), ..ChainOptions::default() };
    let disk = open_with(&[Arc::new(Qcow2)], &load(dir), "t.qcow2", &options).unwrap();
    assert!(read_all(&disk) == theirs, "{snapshot:?} reads otherwise than in QEMU");
    theirs
}

fn assert_clean(dir: &Path, what: &str) {
    let counted = qemu_check(dir, "t.qcow2").unwrap_or_else(|| panic!("{what}: QEMU cannot check it"));
    assert_eq!((counted.corruptions, counted.leaks), (0, 0), "{what}: {counted:#?}");
    let header = std::fs::read(dir.join("t.qcow2")).unwrap();
    assert!(header[7] < 3 || header[79] & 3 == 0, "{what}: a mark was left");
}

/// A disk whose content, and that of its snapshots, is known.
struct Run<'a> {
    dir: &'a Path,
    now: Vec<u8>,
    states: BTreeMap<String, Vec<u8>>,
    compressed: bool,
    next: u32,
}

impl Run<'_> {
    fn write(&mut self, random: &mut Random) {
        let pattern = 1 + random.below(250) as u8;
        let at = random.below(SIZE as u64 / 512 - 1) as usize * 512;
        let len = (1 + random.below(400) as usize) * 512;
        let len = len.min(SIZE - at);
        match random.below(6) {
            0 => {
                run(self.dir, &format!("qemu-io -f qcow2 -c 'write -z {at} {len}' t.qcow2"));
                self.now[at..at + len].fill(0);
            }
            1 if self.compressed => {
                let at = at / 65536 * 65536;
                let command = format!("write -c -P {pattern} {at} 64k");
                // QEMU refuses to compress over a cluster that has its place.
                if tools::succeeds(self.dir, "qemu-io", &["-f", "qcow2", "-c", &command, "t.qcow2"]) {
                    self.now[at..at + 65536].fill(pattern);
                }
            }
            2 | 3 => {
                run(self.dir, &format!("qemu-io -f qcow2 -c 'write -P {pattern} {at} {len}' t.qcow2"));
                self.now[at..at + len].fill(pattern);
            }
            _ => {
                let files = load(self.dir);
                let options = ChainOptions { write: WriteAccess::Yes, ..ChainOptions::default() };
                let disk = open_with(&[Arc::new(Qcow2)], &files, "t.qcow2", &options).unwrap();
                disk.write_at(Buf::copy_of(&vec![pattern; len]), at as u64, Default::default())
                    .wait()
                    .1
                    .unwrap();
                block_on(disk.close()).unwrap();
                std::fs::write(self.dir.join("t.qcow2"), files.get("t.qcow2").unwrap().to_vec()).unwrap();
                self.now[at..at + len].fill(pattern);
            }
        }
    }

    fn any_state(&self, random: &mut Random) -> Option<String> {
        let names: Vec<&String> = self.states.keys().collect();
        (!names.is_empty()).then(|| (*random.pick(&names)).clone())
    }

    /// One random step; says what it was.
    fn step(&mut self, random: &mut Random) -> String {
        let by_us = random.below(3) > 0;
        let by = if by_us { "ours" } else { "QEMU's" };
        match random.below(8) {
            0..=2 => {
                self.write(random);
                "write".into()
            }
            3 | 4 => {
                self.next += 1;
                let name = format!("s{}", self.next);
                if by_us {
                    create(self.dir, &name);
                } else {
                    run(self.dir, &format!("qemu-img snapshot -c {name} t.qcow2"));
                }
                self.states.insert(name.clone(), self.now.clone());
                format!("create {name}, {by}")
            }
            5 | 6 => {
                let Some(name) = self.any_state(random) else { return "nothing".into() };
                if by_us {
                    ours(self.dir, async |image| image.snapshots().unwrap().apply(name.clone()).await)
                        .unwrap();
                } else {
                    run(self.dir, &format!("qemu-img snapshot -a {name} t.qcow2"));
                }
                self.now = self.states[&name].clone();
                format!("apply {name}, {by}")
            }
            _ => {
                let Some(name) = self.any_state(random) else { return "nothing".into() };
                if by_us {
                    ours(self.dir, async |image| image.snapshots().unwrap().delete(name.clone()).await)
                        .unwrap();
                } else {
                    run(self.dir, &format!("qemu-img snapshot -d {name} t.qcow2"));
                }
                self.states.remove(&name);
                format!("delete {name}, {by}")
            }
        }
    }

    fn verify(&self, what: &str) {
        assert_clean(self.dir, what);
        assert!(content(self.dir, None) == self.now, "{what}: the disk is not what it was");
        let names: Vec<String> = list(self.dir).into_iter().map(|(_, name)| name).collect();
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(sorted, self.states.keys().cloned().collect::<Vec<_>>(), "{what}");
        for (name, state) in &self.states {
            assert!(content(self.dir, Some(name)) == *state, "{what}: snapshot {name} is not what it was");
        }
    }
}

fn random_run(options: &str, compressed: bool, seed: u64, steps: u32) {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &format!("qemu-img create -q -f qcow2 {options} t.qcow2 {SIZE}"));
    let (now, states) = (vec![0u8; SIZE], BTreeMap::new());
    let mut model = Run { dir: dir.path(), now, states, compressed, next: 0 };
    let mut random = Random::new(seed);
    let mut done = Vec::new();
    (0..3).for_each(|_| model.write(&mut random));
    for _ in 0..steps {
        done.push(model.step(&mut random));
        assert_clean(dir.path(), &format!("{options}: {}", done.join("; ")));
    }
    model.verify(&format!("{options}: {}", done.join("; ")));
}

#[test]
fn snapshots_by_us_and_by_qemu_in_any_order_keep_every_state() {
    let seeds = std::env::var("VELLUM_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(2u64);
    for (options, compressed) in [
        ("", true),
        ("-o cluster_size=512", false),
        ("-o cluster_size=4k", false),
        ("-o cluster_size=2M", false),
        ("-o compat=0.10", true),
        ("-o extended_l2=on", false),
        ("-o extended_l2=on,cluster_size=16k", false),
        ("-o refcount_bits=4", true),
        ("-o refcount_bits=8,cluster_size=1k", false),
        ("-o refcount_bits=32", false),
        ("-o refcount_bits=64,cluster_size=512", false),
        ("-o lazy_refcounts=on", false),
    ] {
        for seed in 0..seeds {
            random_run(options, compressed, seed * 77 + 5, 14);
        }
    }
}

fn plain(dir: &Path, options: &str) {
    run(dir, &format!("qemu-img create -q -f qcow2 {options} t.qcow2 {SIZE}"));
    run(dir, "qemu-io -f qcow2 -c 'write -P 1 0 300k' -c 'write -P 2 2M 64k' t.qcow2");
}

#[test]
fn refcounts_that_cannot_hold_more_refuse_and_leave_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    plain(dir.path(), "-o refcount_bits=1");
    let before = content(dir.path(), None);
    let make =
        |name: &str| ours(dir.path(), async |image| image.snapshots().unwrap().create(name.into(), 0).await);
    assert_eq!(make("one").unwrap_err().code(), Code::Range);
    assert_clean(dir.path(), "1 bit");
    plain(dir.path(), "-o refcount_bits=2");
    make("one").unwrap();
    make("two").unwrap();
    assert_eq!(make("three").unwrap_err().code(), Code::Range);
    assert_clean_counts(dir.path(), "2 bits");
    assert_eq!(list(dir.path()).len(), 2);
    assert!(content(dir.path(), None) == before);
}

/// Like `assert_clean`, but the session that failed may have left its mark, which the next one takes back.
fn assert_clean_counts(dir: &Path, what: &str) {
    ours(dir, async |_| Ok(())).unwrap();
    assert_clean(dir, what);
}

#[test]
fn the_fields_of_an_entry_are_what_qemu_shows() {
    let dir = tempfile::tempdir().unwrap();
    plain(dir.path(), "");
    let files = load(dir.path());
    let image = block_on(Qcow2.open(request(&files, true, None))).unwrap();
    block_on(image.writable().unwrap().begin()).unwrap();
    let made = block_on(image.snapshots().unwrap().create("käse und brot".into(), 1_600_000_000)).unwrap();
    assert_eq!((made.id.as_str(), made.disk_size, made.vm_state_size), ("1", SIZE as u64, 0));
    let found = block_on(image.snapshots().unwrap().list()).unwrap();
    assert_eq!(found, [made]);
    block_on(image.writable().unwrap().close()).unwrap();
    std::fs::write(dir.path().join("t.qcow2"), files.get("t.qcow2").unwrap().to_vec()).unwrap();
    let text = run(dir.path(), "qemu-img info -f qcow2 --output=json t.qcow2");
    assert!(text.contains("k\\u00E4se und brot") && text.contains("\"date-sec\": 1600000000"), "{text}");
    assert!(!text.contains("\"icount\""), "{text}");
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    plain(dir.path(), "");
    let error =
        ours(dir.path(), async |image| image.snapshots().unwrap().apply("x".into()).await).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    let error =
        ours(dir.path(), async |image| image.snapshots().unwrap().delete("x".into()).await).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    let files = load(dir.path());
    assert_eq!(block_on(Qcow2.open(request(&files, false, Some("x")))).err().unwrap().code(), Code::NotFound);
    assert_clean(dir.path(), "after refusals");
    run(dir.path(), "qemu-img create -q -f qcow2 -o data_file=t.data d.qcow2 1M");
    let both = MemoryFiles::new();
    both.put("t.qcow2", &std::fs::read(dir.path().join("d.qcow2")).unwrap());
    both.put("t.data", &std::fs::read(dir.path().join("t.data")).unwrap());
    let image = block_on(Qcow2.open(request(&both, true, None))).unwrap();
    let error = block_on(image.snapshots().unwrap().create("x".into(), 0)).unwrap_err();
    assert_eq!(error.code(), Code::Feature);
}

#[test]
fn a_snapshot_of_another_size_brings_its_size_along() {
    let dir = tempfile::tempdir().unwrap();
    plain(dir.path(), "");
    let small = content(dir.path(), None);
    create(dir.path(), "small");
    run(dir.path(), "qemu-img resize -q t.qcow2 700M");
    run(dir.path(), "qemu-io -f qcow2 -c 'write -P 5 600M 64k' t.qcow2");
    ours(dir.path(), async |image| image.snapshots().unwrap().apply("small".into()).await).unwrap();
    assert_clean(dir.path(), "smaller");
    assert!(content(dir.path(), None) == small);
    let files = load(dir.path());
    assert_eq!(files.get("t.qcow2").unwrap().len().unwrap() % 65536, 0);
}

#[test]
fn machine_state_of_a_snapshot_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    plain(dir.path(), "");
    create(dir.path(), "one");
    // As a machine would: state behind the disk, then its size in the entry.
    let path = dir.path().join("t.qcow2");
    let mut image = std::fs::read(&path).unwrap();
    let table = tools::be64(&image, 64) as usize;
    image[table + 32..table + 36].copy_from_slice(&77u32.to_be_bytes());
    image[table + 40..table + 48].copy_from_slice(&77u64.to_be_bytes());
    std::fs::write(&path, &image).unwrap();
    create(dir.path(), "two");
    ours(dir.path(), async |image| image.snapshots().unwrap().delete("two".into()).await).unwrap();
    let files = load(dir.path());
    let image = block_on(Qcow2.open(request(&files, false, None))).unwrap();
    assert_eq!(block_on(image.snapshots().unwrap().list()).unwrap()[0].vm_state_size, 77);
    assert_clean(dir.path(), "machine state");
}
