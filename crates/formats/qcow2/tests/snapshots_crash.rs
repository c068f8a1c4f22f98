//! Power losses in the middle of snapshot operations and of recounting a dirty image: what is left is the state before
//! or after, with lost space at most.

mod tools;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use tools::{be64, run};
use vellum_conformance::format::{open_with, read_all};
use vellum_core::{
    Access, Asker, BoxFuture, ChainOptions, CheckReport, CheckRequest, Events, FlushPoint, Format, Image,
    Limits, Location, OpenRequest, Providers, Resolver, Result, Snapshots, block_on, mutation,
};
use vellum_format_qcow2::Qcow2;
use vellum_sim::{
    Content, Crash, Depth, Fault, FaultKind, FaultOn, FileSet, MemoryFiles, Random, SimFiles, masks,
};

const NAME: &str = "t.qcow2";

fn request(resolver: &Arc<dyn Resolver>) -> OpenRequest {
    let opened =
        resolver.open(NAME, &Asker::User, Access { write: true, ..Access::default() }).wait().unwrap();
    OpenRequest {
        storage: opened.storage,
        location: Location(NAME.into()),
        resolver: resolver.clone(),
        limits: Limits::default(),
        events: Events::default(),
        open_parts: true,
        write: true,
        access: vellum_core::Access::default(),
        skip_consistency_checks: false,
        snapshot: None,
        providers: Providers::seeded(1, 1_700_000_000),
    }
}

/// A session of our driver.
fn session(resolver: &Arc<dyn Resolver>, what: impl AsyncFnOnce(&dyn Image) -> Result<()>) -> Result<()> {
    block_on(async {
        let image = Qcow2.open(request(resolver)).await?;
        let writable = image.writable().expect("opened for writing");
        writable.begin().await?;
        what(image.as_ref()).await?;
        writable.close().await
    })
}

fn memory(image: &[u8]) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put(NAME, image);
    files
}

fn check(image: &[u8]) -> CheckReport {
    let files = memory(image);
    let request = CheckRequest {
        storage: files.get(NAME).unwrap(),
        location: Location(NAME.into()),
        resolver: files,
        limits: Limits::default(),
        events: Events::default(),
        plan: true,
    };
    block_on(Qcow2.check(request)).expect("the image can be checked")
}

/// What is done to the snapshots of an image.
type Operation = fn(&dyn Snapshots) -> BoxFuture<'_, Result<()>>;
/// The disk and all snapshots, by name.
type View = Vec<(String, Vec<u8>)>;

fn view(image: &[u8]) -> View {
    let files = memory(image);
    let read = |snapshot: Option<&str>| {
        let options = ChainOptions { snapshot: snapshot.map(str::to_owned), ..ChainOptions::default() };
        read_all(&open_with(&[Arc::new(Qcow2)], &files, NAME, &options).expect("the image opens"))
    };
    let resolver: Arc<dyn Resolver> = files.clone();
    let image = block_on(Qcow2.open(request(&resolver))).expect("the image opens");
    let list = block_on(image.snapshots().unwrap().list()).expect("the snapshots can be listed");
    let mut view = vec![(String::new(), read(None))];
    view.extend(list.into_iter().map(|info| (info.name.clone(), read(Some(&info.name)))));
    view
}

fn is_dirty(image: &[u8]) -> bool {
    be64(image, 0) as u32 >= 3 && be64(image, 72) & 1 != 0
}

/// Asserts what must hold for every state that a power loss leaves.
fn survives(image: &[u8], allowed: &[&View], what: &dyn Fn() -> String) {
    let seen = view(image);
    assert!(allowed.contains(&&seen), "{}: neither the state before nor the one after", what());
    let report = check(image);
    let lossy = report.fixes.iter().any(|fix| fix.is_lossy);
    assert!(!lossy, "{}: data is lost: {:#?}", what(), report.findings);
    // Version 2 has no mark for "count me anew": flags may disagree with counts there until a repair.
    let marked = is_dirty(image) || image[7] < 3;
    assert!(report.errors == 0 || marked, "{}: {:#?}", what(), report.findings);
    let files = memory(image);
    let resolver: Arc<dyn Resolver> = files.clone();
    session(&resolver, async |_| Ok(())).unwrap_or_else(|e| panic!("{}: {e:?}", what()));
    let recovered = files.get(NAME).unwrap().to_vec();
    assert!(view(&recovered) == seen, "{}: recovery changed the content", what());
    if image[7] >= 3 {
        let report = check(&recovered);
        assert!(
            report.errors == 0 && !is_dirty(&recovered),
            "{}: after recovery {:#?}",
            what(),
            report.findings
        );
    }
}

/// Runs `what` on `image` with every operation recorded, and looks at the states that power losses leave.
fn crash(image: &[u8], name: &str, what: impl AsyncFnOnce(&dyn Image) -> Result<()>) -> usize {
    let mut start = FileSet::default();
    start.put(NAME, Content::from_bytes(image));
    let files = SimFiles::new(start.clone());
    session(&files.resolver(), what).unwrap();
    let after = files.snapshot().get(NAME).unwrap().to_vec();
    let (old, new) = (view(image), view(&after));
    let report = check(&after);
    assert!(report.is_clean(), "{name}: {:#?}", report.findings);
    let trace = files.take_trace();
    let mut random = Random::new(7);
    let mut seen = HashSet::new();
    for moment in Crash::moments(&trace) {
        let crash = Crash::at(&trace, &start, moment);
        for mask in masks(&crash.members, Depth { exhaustive: 7, samples: 60 }, &mut random) {
            let state = crash.state(&mask);
            if !seen.insert(state.hash()) {
                continue;
            }
            let bytes = state.get(NAME).unwrap().to_vec();
            let text = || format!("{name}, event {moment}, mask {mask}\n{}", crash.explain(&mask));
            survives(&bytes, &[&old, &new], &text);
        }
    }
    seen.len()
}

fn make(dir: &Path, options: &str) -> Vec<u8> {
    run(dir, &format!("qemu-img create -q -f qcow2 {options} {NAME} 1M"));
    run(
        dir,
        &format!(
            "qemu-io -f qcow2 -c 'write -P 1 0 100k' -c 'write -P 2 700k 40k' -c 'write -z 300k 64k' {NAME}"
        ),
    );
    run(dir, &format!("qemu-img snapshot -c one {NAME}"));
    run(dir, &format!("qemu-io -f qcow2 -c 'write -P 3 20k 30k' -c 'write -P 4 512k 16k' {NAME}"));
    run(dir, &format!("qemu-img snapshot -c two {NAME}"));
    run(dir, &format!("qemu-io -f qcow2 -c 'write -P 5 40k 30k' {NAME}"));
    std::fs::read(dir.join(NAME)).unwrap()
}

#[test]
fn a_power_loss_in_a_snapshot_operation_leaves_before_or_after() {
    let mut states = 0;
    for options in [
        "-o cluster_size=4k",
        "-o cluster_size=512",
        "",
        "-o extended_l2=on,cluster_size=16k",
        "-o cluster_size=4k,refcount_bits=64",
        "-o cluster_size=4k,compat=0.10",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let image = make(dir.path(), options);
        let name = |what: &str| format!("{options}: {what}");
        states += crash(&image, &name("create"), async |image| {
            image.snapshots().unwrap().create("three".into(), 0).await.map(drop)
        });
        for which in ["one", "two"] {
            states += crash(&image, &name("apply"), async |image| {
                image.snapshots().unwrap().apply(which.into()).await
            });
            states += crash(&image, &name("delete"), async |image| {
                image.snapshots().unwrap().delete(which.into()).await
            });
        }
    }
    println!("{states} states");
}

#[test]
fn a_power_loss_while_a_dirty_image_is_recounted_changes_no_content() {
    let mut states = 0;
    for options in ["-o cluster_size=4k", "-o cluster_size=512", "-o cluster_size=4k,refcount_bits=1"] {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), &format!("qemu-img create -q -f qcow2 {options} {NAME} 1M"));
        run(dir.path(), &format!("qemu-io -f qcow2 -c 'write -P 1 0 100k' -c 'write -P 2 700k 40k' {NAME}"));
        let clean = std::fs::read(dir.path().join(NAME)).unwrap();
        let table = be64(&clean, 48) as usize;
        let block = be64(&clean, table as u64) as usize;
        for kind in 0..3 {
            let mut image = clean.clone();
            image[79] |= 1;
            match kind {
                // Counts of clusters in use are lost, others are too high: mended in place.
                0 => image[block + 2..block + 24].fill(0x11),
                // The only block is lost: new structures.
                1 => image[table..table + 8].fill(0),
                // Counts are 0 where there is a block: mended in place.
                _ => image[block..block + 64].fill(0),
            }
            states += crash(&image, &format!("{options}: recount {kind}"), async |_| Ok(()));
        }
    }
    println!("{states} states");
}

#[test]
fn without_its_flushes_a_snapshot_operation_leaves_worse() {
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), "-o cluster_size=4k");
    for point in [FlushPoint::Data, FlushPoint::Other] {
        let image = image.clone();
        // On a thread of its own: what is left out is left out there only.
        let without = std::thread::spawn(move || {
            mutation::leave_out(Some(point));
            let operations: [(&str, Operation); 3] = [
                ("create", |all| Box::pin(async { all.create("three".into(), 0).await.map(drop) })),
                ("apply", |all| all.apply("one".into())),
                ("delete", |all| all.delete("one".into())),
            ];
            for (name, operation) in operations {
                crash(&image, name, async |image| operation(image.snapshots().unwrap()).await);
            }
        });
        assert!(without.join().is_err(), "nobody misses the flush {point:?}");
    }
}

#[test]
fn whatever_operation_fails_the_image_is_before_or_after() {
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), "-o cluster_size=4k");
    let operations: [(&str, Operation); 3] = [
        ("create", |all| Box::pin(async { all.create("three".into(), 0).await.map(drop) })),
        ("apply", |all| all.apply("one".into())),
        ("delete", |all| all.delete("one".into())),
    ];
    let mut failures = 0;
    for (name, operation) in operations {
        let run = |fault: Option<Fault>| {
            let mut start = FileSet::default();
            start.put(NAME, Content::from_bytes(&image));
            let files = SimFiles::new(start);
            files.arm(fault);
            let result =
                session(&files.resolver(), async |image| operation(image.snapshots().unwrap()).await);
            assert!(result.is_err() || !files.fault_struck(), "{name}: {fault:?} was not noticed");
            (files.fault_struck(), files.snapshot().get(NAME).unwrap().to_vec())
        };
        let (_, after) = run(None);
        let (old, new) = (view(&image), view(&after));
        for kind in [FaultKind::Io, FaultKind::NoSpace, FaultKind::Short] {
            for is_persistent in [false, true] {
                for nth in 0.. {
                    let fault = Fault { on: FaultOn::Change, nth, kind, is_persistent };
                    let (struck, state) = run(Some(fault));
                    if !struck {
                        break;
                    }
                    failures += 1;
                    survives(&state, &[&old, &new], &|| format!("{name}, {fault}"));
                }
            }
        }
    }
    println!("{failures} failures");
}
