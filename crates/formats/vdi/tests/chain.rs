//! Differencing images: found by UUID, layered block by block, never read as a whole disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{image_of, open_vdi, put32, vdi};
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, read_all};
use vellum_core::{ChainOptions, Code};
use vellum_sim::MemoryFiles;

const MIB: usize = 1 << 20;

/// A child of `parent` (bytes of an image), with `model`'s blocks and block `zero` as ZERO.
fn child_of(parent: &[u8], model: &Model, kind: u32, zero: usize) -> Vec<u8> {
    let mut child = image_of(&Recipe::default(), model);
    put32(&mut child, 0x4C, kind);
    // Another identity than the parent's, which has the same seed.
    child[0x188] ^= 0xff;
    child[0x198] ^= 0xff;
    let (create, modify) = (parent[0x188..0x198].to_vec(), parent[0x198..0x1A8].to_vec());
    child[0x1A8..0x1B8].copy_from_slice(&create);
    child[0x1B8..0x1C8].copy_from_slice(&modify);
    put32(&mut child, MIB + zero * 4, 0xFFFF_FFFE);
    child
}

fn chain(kind: u32) -> (Arc<MemoryFiles>, Vec<u8>) {
    let base = Model::with_runs(6 << 20, &[(0, 6 << 20)]);
    // The child is longer than its parent: zeros beyond.
    let top = Model::with_runs(8 << 20, &[(2 << 20, 1 << 20)]);
    let parent = image_of(&Recipe::default(), &base);
    let child = child_of(&parent, &top, kind, 4);
    let mut expected = base.read(0, 8 << 20);
    expected[2 * MIB..3 * MIB].copy_from_slice(&top.read(2 << 20, MIB));
    expected[4 * MIB..5 * MIB].fill(0);
    let files = MemoryFiles::new();
    files.put("vm/base.vdi", &parent);
    files.put("vm/top.vdi", &child);
    (files, expected)
}

#[test]
fn a_child_reads_through_its_parent_found_by_uuid() {
    for kind in [3, 4] {
        let (files, expected) = chain(kind);
        files.put("vm/a-broken-neighbour.vdi", &[0xff; 100]);
        let disk = open_vdi(&files, "vm/top.vdi").unwrap();
        assert_eq!(disk.layers().len(), 2);
        assert!(read_all(&disk) == expected);
        let parent = disk.layers()[0].image.info().parent.clone().unwrap();
        assert!(parent.hints.is_empty());
        assert_eq!(parent.expected.uuid, disk.layers()[1].image.info().identity.uuid);
    }
}

#[test]
fn a_missing_or_modified_parent_is_an_error() {
    let (files, _) = chain(4);
    let mut parent = files.get("vm/base.vdi").unwrap().to_vec();
    parent[0x19f] ^= 1;
    files.put("vm/base.vdi", &parent);
    assert_eq!(open_vdi(&files, "vm/top.vdi").err().unwrap().code(), Code::ParentModified);
    let options = ChainOptions { allow_modified_parent: true, ..ChainOptions::default() };
    assert_eq!(open_with(&[vdi()], &files, "vm/top.vdi", &options).unwrap().layers().len(), 2);
    // A null uuidParentModify is not compared.
    let mut child = files.get("vm/top.vdi").unwrap().to_vec();
    child[0x1B8..0x1C8].fill(0);
    files.put("vm/top.vdi", &child);
    assert_eq!(open_vdi(&files, "vm/top.vdi").unwrap().layers().len(), 2);

    parent[0x188] ^= 1;
    files.put("vm/base.vdi", &parent);
    assert_eq!(open_vdi(&files, "vm/top.vdi").err().unwrap().code(), Code::ParentMissing);
}

#[test]
fn a_normal_image_with_a_linkage_has_a_parent_too() {
    let (files, expected) = chain(1);
    let disk = open_vdi(&files, "vm/top.vdi").unwrap();
    assert_eq!(disk.layers().len(), 2);
    assert!(read_all(&disk) == expected);
}

#[test]
fn a_differencing_image_without_linkage_is_never_a_whole_disk() {
    for kind in [3, 4] {
        let (files, _) = chain(kind);
        let mut child = files.get("vm/top.vdi").unwrap().to_vec();
        child[0x1A8..0x1B8].fill(0);
        files.put("vm/top.vdi", &child);
        let error = open_vdi(&files, "vm/top.vdi").err().unwrap();
        assert_eq!((error.code(), error.field_name()), (Code::Corrupt, Some("uuidLinkage")));
        assert_eq!(error.offset(), Some(0x1A8));
    }
}
