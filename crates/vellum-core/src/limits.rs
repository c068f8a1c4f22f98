//! Limits that hold before anything is allocated (RELIABILITY.md section 1.1).

/// Hard limits on what an image may ask for. Each is named in the error that it causes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of tables that one image keeps in memory (the table cache).
    pub table_cache_bytes: usize,
    /// Bytes of one table that must be held whole (an L1, a grain directory).
    pub table_bytes: u64,
    /// Bytes of a VMDK descriptor.
    pub descriptor_bytes: u64,
    /// Extents of one VMDK.
    pub extents: usize,
    /// Images in a chain.
    pub chain_depth: usize,
    /// Internal snapshots.
    pub snapshots: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            table_cache_bytes: 32 << 20,
            table_bytes: 32 << 20,
            descriptor_bytes: 1 << 20,
            extents: 4096,
            chain_depth: 64,
            snapshots: 65_536,
        }
    }
}
