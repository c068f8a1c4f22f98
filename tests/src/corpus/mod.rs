//! Hostile images: every one is built here, byte by byte, from the format sheets, and says what must happen to it.
//!
//! The classes are those of RELIABILITY.md section 1. `tests/hostile.rs` holds the library to section 1.1 on every
//! case, `tests/hostile_cli.rs` the program, and `fuzz/` takes the cases as seeds.
//!
//! | Module | Holds |
//! |---|---|
//! | [`kit`] | the case, sparse files, how cases are declared |
//! | [`harness`] | the files of a case in memory, counted and recorded, and the work that is done on them |
//! | `vdi`, `vhd`, `vmdk`, `vmdk_text`, `qcow2`, `qcow2_tables` | the cases of a format, made from one healthy image |
//! | `refs` | references to other files, for every format that has them |
//! | `probing` | polyglots, raw, files that are nothing |

// Zeros of a check are ranges of bytes, one or many.
#![allow(clippy::single_range_in_vec_init)]

pub mod harness;
pub mod kit;
mod probing;
mod qcow2;
mod qcow2_tables;
mod refs;
mod vdi;
mod vhd;
mod vmdk;
mod vmdk_text;

pub use kit::{Check, Content, Expect, HostileCase, HostileFile, Sparse};

/// Every case. Names are unique.
pub fn all() -> Vec<HostileCase> {
    let mut cases = kit::Cases::default();
    vdi::add(&mut cases);
    vhd::add(&mut cases);
    vmdk::add(&mut cases);
    vmdk_text::add(&mut cases);
    qcow2::add(&mut cases);
    qcow2_tables::add(&mut cases);
    refs::add(&mut cases);
    probing::add(&mut cases);
    cases.into_vec()
}

/// One healthy image of each kind, for seeds and for whoever wants a starting point: (file name, content).
pub fn healthy() -> Vec<(&'static str, Sparse)> {
    vec![
        ("disk.vdi", vdi::base()),
        ("dynamic.vhd", vhd::dynamic()),
        ("fixed.vhd", vhd::fixed()),
        ("sparse.vmdk", vmdk::sparse()),
        ("stream.vmdk", vmdk::stream()),
        ("cowd.vmdk", vmdk::cowd()),
        ("sesparse.vmdk", vmdk::sesparse()),
        ("flat.vmdk", vmdk_text::flat().0),
        ("disk.qcow2", qcow2::base()),
        ("compressed.qcow2", qcow2_tables::compressed()),
        ("extended.qcow2", qcow2_tables::extended()),
    ]
}

/// Puts the checksums of a VHD right, wherever it has a footer or a dynamic header: fuzzers get past them with it.
pub fn seal_vhd(file: Sparse) -> Sparse {
    vhd::sealed(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn names_are_unique_and_every_class_is_there() {
        let cases = all();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len(), "two cases with one name");
        assert!(cases.len() >= 150, "only {} cases", cases.len());
        let mut classes: BTreeMap<(&str, u8), usize> = BTreeMap::new();
        for case in &cases {
            *classes.entry((case.group(), case.class)).or_default() += 1;
        }
        for class in 1..=8 {
            assert!(cases.iter().any(|case| case.class == class), "class {class} has no case");
        }
        for group in ["vdi", "vhd", "vmdk", "qcow2"] {
            for class in [1, 2, 3, 4, 5, 8] {
                // VDI stores no name of a parent: its references are identities, which are class 3 all the same.
                assert!(classes.contains_key(&(group, class)), "{group} has no case of class {class}");
            }
        }
    }

    #[test]
    fn every_case_names_a_file_that_it_has() {
        for case in all() {
            assert!(case.files.iter().any(|file| file.path == case.open), "{}", case.name);
        }
    }
}
