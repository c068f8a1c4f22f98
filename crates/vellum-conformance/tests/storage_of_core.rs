//! The storages of `vellum-core` keep the contract of `Storage`.

use std::sync::Arc;
use vellum_conformance::storage::{MIN_LEN, check};
use vellum_core::{Concat, Memory, Slice, Storage};

#[test]
fn memory_keeps_the_contract() {
    check(|| Arc::new(Memory::new("memory", 0)));
    check(|| Arc::new(Memory::from_bytes("memory", &[7; 10_000])));
}

#[test]
fn slice_keeps_the_contract() {
    check(|| {
        let inner: Arc<dyn Storage> = Arc::new(Memory::from_bytes("inner", &vec![9; 400_000]));
        Arc::new(Slice::new(inner, 1003..1003 + MIN_LEN + 5).unwrap())
    });
}

#[test]
fn concat_keeps_the_contract() {
    check(|| {
        let parts = [0u64, 1, 65_536, 100_003, 0, 4096, 120_000]
            .map(|len| Arc::new(Memory::new("part", len)) as Arc<dyn Storage>);
        Arc::new(Concat::new("parts", parts.into()).unwrap())
    });
}
