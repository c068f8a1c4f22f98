//! Which files an image may name, and what the resolver does with names.

mod common;

use common::{LoopDevice, or_say_so, scratch};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};
use vellum_core::{Access, Asker, Buf, Code, Location, Opened, Resolver, Result, WriteFlags};
use vellum_io::{FilePolicy, LocalFiles, OpenOptions};

/// `images/child`, files beside and below it, and files elsewhere.
fn tree() -> tempfile::TempDir {
    let scratch = scratch();
    let at = |name: &str| scratch.path().join(name);
    for directory in ["images/sub", "images-2", "outside", "allowed/deep"] {
        std::fs::create_dir_all(at(directory)).unwrap();
    }
    for file in [
        "images/child",
        "images/base",
        "images/sub/base",
        "images/a b.vhd",
        "images-2/x",
        "outside/x",
        "allowed/deep/x",
        "images/we\\ird",
    ] {
        std::fs::write(at(file), file).unwrap();
    }
    symlink("../outside/x", at("images/leads-out")).unwrap();
    symlink("sub/base", at("images/leads-in")).unwrap();
    symlink("../outside", at("images/dir-out")).unwrap();
    symlink("loop-b", at("images/loop-a")).unwrap();
    symlink("loop-a", at("images/loop-b")).unwrap();
    symlink("../outside/nothing", at("images/dangling")).unwrap();
    symlink("images", at("alias")).unwrap();
    common::run("mkfifo", "coreutils", &[at("images/fifo").to_str().unwrap()]).unwrap();
    std::mem::forget(std::os::unix::net::UnixListener::bind(at("images/socket")).unwrap());
    scratch
}

fn files(policy: FilePolicy) -> LocalFiles {
    LocalFiles::new(policy, OpenOptions::default())
}

fn open(files: &LocalFiles, child: &Path, name: &str) -> Result<Opened> {
    let of = Location(child.to_str().unwrap().to_owned());
    let part = files.open(name, &Asker::Part { of: of.clone() }, Access::default()).wait();
    let parent = files.open(name, &Asker::Parent { of }, Access::default()).wait();
    assert_eq!(part.as_ref().map_err(|e| e.code()).err(), parent.as_ref().map_err(|e| e.code()).err());
    parent
}

fn content(opened: &Opened) -> String {
    let len = opened.storage.len().unwrap() as usize;
    let (buf, result) = opened.storage.read_at(Buf::zeroed(len), 0).wait();
    result.unwrap();
    String::from_utf8(buf.to_vec()).unwrap()
}

#[test]
fn by_default_an_image_names_files_in_its_own_directory_and_below() {
    let tree = tree();
    let child = tree.path().join("images/child");
    let absolute = tree.path().join("images/base");
    let files = files(FilePolicy::default());
    for (name, expected) in [
        ("base", "images/base"),
        ("./base", "images/base"),
        ("sub/base", "images/sub/base"),
        (r"sub\base", "images/sub/base"),
        (r".\sub\base", "images/sub/base"),
        (r"we\ird", "images/we\\ird"),
        ("sub/../base", "images/base"),
        ("../images/base", "images/base"),
        ("../alias/base", "images/base"),
        ("leads-in", "images/sub/base"),
        ("a b.vhd", "images/a b.vhd"),
        (absolute.to_str().unwrap(), "images/base"),
        // Itself: the chain finds the ring by the location.
        ("child", "images/child"),
    ] {
        let opened = open(&files, &child, name).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(content(&opened), expected, "{name}");
        assert_eq!(Path::new(&opened.location.0), tree.path().join(expected), "locations are canonical");
        assert!(opened.storage.limits().read_only);
        // Reached by another way, it is still the directory of the image that counts.
        open(&files, &tree.path().join("alias/child"), name).unwrap();
    }
}

#[test]
fn the_advice_about_a_refused_name_is_one_that_helps() {
    let tree = tree();
    let of = Location(tree.path().join("images/child").to_str().unwrap().to_owned());
    let files = files(FilePolicy::default());
    for (name, code) in [
        ("../outside/x", Code::PathEscape),
        ("fifo", Code::ExternalRef),
        (r"C:\disks\base.vhd", Code::ExternalRef),
        ("http://example.org/x", Code::RemoteRef),
    ] {
        let advice = |asker| {
            let error = files.open(name, &asker, Access::default()).wait().err().unwrap();
            assert_eq!(error.code(), code);
            error.hint_text().unwrap().to_owned()
        };
        // The user can name a parent, but no extent and no data file.
        let parent = advice(Asker::Parent { of: of.clone() });
        assert!(parent.contains("--parent FILE"), "{parent}");
        let part = advice(Asker::Part { of: of.clone() });
        assert!(!part.contains("--parent"), "{part}");
        assert!(part.contains("--allow-dir DIR") || code != Code::PathEscape, "{part}");
    }
}

#[test]
fn every_hostile_name_is_refused_with_its_code() {
    let tree = tree();
    let child = tree.path().join("images/child");
    let outside = tree.path().join("outside/x");
    let files = files(FilePolicy::default());
    let long = "x".repeat(10_000);
    let deep = "../".repeat(300) + "etc/passwd";
    let start = Instant::now();
    for (name, code) in [
        ("../outside/x", Code::PathEscape),
        (r"..\outside\x", Code::PathEscape),
        ("sub/../../outside/x", Code::PathEscape),
        ("../images-2/x", Code::PathEscape),
        ("leads-out", Code::PathEscape),
        ("dir-out/x", Code::PathEscape),
        ("dir-out/nothing", Code::PathEscape),
        ("../outside/nothing", Code::PathEscape),
        ("/no/such/file", Code::PathEscape),
        ("/etc/passwd", Code::PathEscape),
        ("/etc/shadow", Code::PathEscape),
        (outside.to_str().unwrap(), Code::PathEscape),
        (deep.as_str(), Code::PathEscape),
        ("/dev/zero", Code::PathEscape),
        ("/proc/self/mem", Code::PathEscape),
        ("..", Code::PathEscape),
        ("/", Code::PathEscape),
        (".", Code::ExternalRef),
        ("sub", Code::ExternalRef),
        ("fifo", Code::ExternalRef),
        ("socket", Code::ExternalRef),
        ("", Code::ExternalRef),
        (r"C:\disks\base.vhd", Code::ExternalRef),
        (r"\\.\PhysicalDrive0", Code::ExternalRef),
        (r"\\server\share\base.vhd", Code::RemoteRef),
        ("//server/share/base.vhd", Code::RemoteRef),
        ("http://169.254.169.254/latest", Code::RemoteRef),
        ("nbd:unix:/run/nbd.sock", Code::RemoteRef),
        ("nbd+unix:///x?socket=/run/x", Code::RemoteRef),
        ("json:{\"file.filename\":\"/etc/passwd\"}", Code::RemoteRef),
        ("fat:rw:/etc", Code::RemoteRef),
        ("file:///etc/passwd", Code::RemoteRef),
        ("base\0.vhd", Code::NulInName),
        ("loop-a", Code::NotFound),
        ("dangling", Code::NotFound),
        ("nothing", Code::NotFound),
        ("base/x", Code::NotFound),
        (long.as_str(), Code::NotFound),
    ] {
        let error = open(&files, &child, name).err().unwrap_or_else(|| panic!("{name:?} was opened"));
        assert_eq!(error.code(), code, "{name:?}: {error:?}");
        if code != Code::NotFound {
            assert_eq!(error.image_name(), child.to_str(), "{error:?}");
            assert!(
                error.found_value().is_some() && (error.hint_text().is_some() || code == Code::NulInName)
            );
        }
    }
    assert!(start.elapsed() < Duration::from_secs(2), "nothing may hang");
}

#[test]
fn allowed_directories_and_allow_any_open_what_they_say() {
    let tree = tree();
    let child = tree.path().join("images/child");
    // Named by way of a link: directories are compared as what they are.
    symlink("allowed", tree.path().join("allowed-link")).unwrap();
    let some = files(FilePolicy {
        allowed_directories: vec![tree.path().join("allowed-link"), "/no/such/directory".into()],
        ..FilePolicy::default()
    });
    assert_eq!(content(&open(&some, &child, "../allowed/deep/x").unwrap()), "allowed/deep/x");
    assert_eq!(open(&some, &child, "../outside/x").err().unwrap().code(), Code::PathEscape);
    assert_eq!(open(&some, &child, "../allowed/nothing").err().unwrap().code(), Code::NotFound);
    let any = files(FilePolicy { allow_any: true, ..FilePolicy::default() });
    for name in ["../outside/x", "leads-out", "dir-out/x"] {
        assert_eq!(content(&open(&any, &child, name).unwrap()), "outside/x", "{name}");
    }
    for (name, code) in [
        ("/dev/zero", Code::ExternalRef),
        ("fifo", Code::ExternalRef),
        ("sub", Code::ExternalRef),
        ("nbd://x/y", Code::RemoteRef),
        ("/no/such/file", Code::NotFound),
    ] {
        assert_eq!(open(&any, &child, name).err().unwrap().code(), code, "{name}");
    }
}

#[test]
fn devices_need_a_policy_of_their_own() {
    let tree = tree();
    let child = tree.path().join("images/child");
    std::fs::write(tree.path().join("backing"), vec![1; 65_536]).unwrap();
    let Some(device) = or_say_so(LoopDevice::over(&tree.path().join("backing"))) else { return };
    let name = device.path.to_str().unwrap();
    let policy = |allow_any, allow_devices| {
        let directories = vec!["/dev".into()];
        files(FilePolicy { allowed_directories: directories, allow_any, allow_devices })
    };
    for (any, devices) in [(false, false), (true, false), (false, true)] {
        assert_eq!(open(&policy(any, devices), &child, name).err().unwrap().code(), Code::ExternalRef);
    }
    assert_eq!(open(&policy(true, true), &child, name).unwrap().storage.len().unwrap(), 65_536);
    // A user names what he likes.
    let by_user = policy(false, false).open(name, &Asker::User, Access::default()).wait().unwrap();
    assert_eq!(by_user.storage.len().unwrap(), 65_536);
}

#[test]
fn an_image_at_the_root_does_not_own_the_machine() {
    let tree = tree();
    let name = format!("/vellum-io-test-{}", std::process::id());
    if or_say_so(std::fs::write(&name, b"x").map_err(|e| format!("writing {name}: {e}"))).is_none() {
        return;
    }
    let files = files(FilePolicy::default());
    let below = open(&files, Path::new(&name), tree.path().join("outside/x").to_str().unwrap());
    let beside = open(&files, Path::new(&name), &name);
    std::fs::remove_file(&name).unwrap();
    assert_eq!(below.err().unwrap().code(), Code::PathEscape);
    assert_eq!(content(&beside.unwrap()), "x");
}

#[test]
fn a_name_that_is_exchanged_while_it_is_opened_never_leads_out() {
    let tree = tree();
    let child = tree.path().join("images/child");
    let (swap, next) = (tree.path().join("images/swap"), tree.path().join("images/next"));
    std::fs::write(&swap, "images/base").unwrap();
    let files = files(FilePolicy::default());
    let stop = Instant::now() + Duration::from_millis(300);
    let (mut inside, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < stop {
                symlink("../outside/x", &next).unwrap();
                std::fs::rename(&next, &swap).unwrap();
                std::fs::write(&next, "images/base").unwrap();
                std::fs::rename(&next, &swap).unwrap();
            }
        });
        let asker = Asker::Parent { of: Location(child.to_str().unwrap().to_owned()) };
        while Instant::now() < stop {
            match files.open("swap", &asker, Access::default()).wait() {
                Ok(opened) => {
                    assert_eq!(content(&opened), "images/base");
                    inside += 1;
                }
                Err(error) => {
                    assert!(matches!(error.code(), Code::PathEscape | Code::NotFound), "{error:?}");
                    refused += 1;
                }
            }
        }
    });
    assert!(inside > 0 && refused > 0, "the race was not run: {inside} opened, {refused} refused");
}

#[test]
fn users_name_paths_and_file_urls() {
    let tree = tree();
    let files = files(FilePolicy::default());
    let user = |name: &str| files.open(name, &Asker::User, Access::default()).wait();
    let path = tree.path().join("images/a b.vhd");
    let url = format!("file://{}", path.to_str().unwrap().replace(' ', "%20"));
    for name in [path.to_str().unwrap(), url.as_str(), tree.path().join("alias/a b.vhd").to_str().unwrap()] {
        let opened = user(name).unwrap();
        assert_eq!(Path::new(&opened.location.0), path);
        assert_eq!(content(&opened), "images/a b.vhd");
    }
    // Links and other directories are the user's own affair.
    assert_eq!(content(&user(tree.path().join("images/leads-out").to_str().unwrap()).unwrap()), "outside/x");
    for (name, code) in [
        ("nbd://localhost/x", Code::Feature),
        ("https://example.invalid/x", Code::Feature),
        ("/no/such/file", Code::NotFound),
        (tree.path().join("images/fifo").to_str().unwrap(), Code::Usage),
        (tree.path().to_str().unwrap(), Code::Usage),
        ("a\0b", Code::NulInName),
    ] {
        assert_eq!(user(name).err().unwrap().code(), code, "{name:?}");
    }
}

#[test]
fn files_are_made_renamed_listed_and_deleted() {
    let scratch = scratch();
    let files = files(FilePolicy::default());
    let at = |name: &str| Location(scratch.path().join(name).to_str().unwrap().to_owned());
    let made = files.create(&at("b.part"), false).wait().unwrap();
    made.write_at(Buf::copy_of(b"new"), 0, WriteFlags::default()).wait().1.unwrap();
    made.flush().wait().unwrap();
    assert_eq!(files.create(&at("b.part"), false).wait().err().unwrap().code(), Code::Exists);
    assert_eq!(files.create(&at("no/such/directory"), true).wait().err().unwrap().code(), Code::NotFound);
    std::fs::write(scratch.path().join("b"), "old").unwrap();
    files.rename(&at("b.part"), &at("b")).wait().unwrap();
    files.sync_directory(&at("b")).wait().unwrap();
    assert_eq!(std::fs::read(scratch.path().join("b")).unwrap(), b"new");
    assert!(files.exists(&at("b")).wait().unwrap());
    assert!(!files.exists(&at("b.part")).wait().unwrap());
    assert!(!files.exists(&at("b/below")).wait().unwrap());
    assert_eq!(
        files.create(&at("b"), true).wait().err().unwrap().code(),
        Code::Locked,
        "it is still being written"
    );
    drop(made);
    files.create(&at("b"), true).wait().unwrap();
    assert_eq!(std::fs::read(scratch.path().join("b")).unwrap(), b"", "replacing empties");

    for name in ["c", "a", "d"] {
        files.create(&at(name), false).wait().unwrap();
    }
    std::fs::create_dir(scratch.path().join("directory")).unwrap();
    symlink("a", scratch.path().join("link")).unwrap();
    assert_eq!(files.siblings(&at("b")).wait().unwrap(), [at("a"), at("c"), at("d")]);
    files.delete(&at("c")).wait().unwrap();
    assert_eq!(files.delete(&at("c")).wait().unwrap_err().code(), Code::NotFound);
    assert_eq!(files.siblings(&at("b")).wait().unwrap(), [at("a"), at("d")]);

    assert_eq!(files.beside(&at("b"), "b-s001.vmdk"), at("b-s001.vmdk"));
    assert_eq!(files.beside(&at("b"), "../../etc/x"), at("x"), "a name, not a path");
    assert_eq!(files.beside(&Location("disk".into()), "x"), Location("x".into()));
    assert_eq!(files.file_name(&at("b-s001.vmdk")), "b-s001.vmdk");
}

#[test]
fn a_huge_directory_is_told_up_to_the_limit_in_order() {
    let scratch = scratch();
    for number in (0..10_050).rev() {
        std::fs::File::create(scratch.path().join(format!("{number:05}"))).unwrap();
    }
    let location = Location(scratch.path().join("00003").to_str().unwrap().to_owned());
    let siblings = files(FilePolicy::default()).siblings(&location).wait().unwrap();
    assert_eq!(siblings.len(), 10_000);
    assert!(siblings.is_sorted_by_key(|location| location.0.clone()));
    assert!(
        siblings.first().unwrap().0.ends_with("/00000") && siblings.last().unwrap().0.ends_with("/10000")
    );
}
