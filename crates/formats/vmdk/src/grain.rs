//! Compressed grains (sheet section 4): zlib data behind a marker.
//!
//! The length of a grain stands in its marker, not in the tables. A lookup therefore answers with an upper bound
//! (the next grain of the same table, or the greatest legal length) that begins *at the marker*, and this codec reads the
//! marker when the bytes are there: no read for the marker alone, and neighbouring grains come with one request.

use crate::header::{GRAIN_MARKER_BYTES, Marker};
use std::sync::Arc;
use vellum_core::bytes::{add, array, index, mul, wide};
use vellum_core::{Code, Codec, Error, Result};
use zerocopy::FromBytes;

/// How compressed grains are framed in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// `u64 LBA`, `u32 length`, data (flag bit 17).
    Marker,
    /// Flag bit 17 clear: `u32 length`, data, or data alone [the sheet has it unconfirmed].
    Bare,
}

/// Greatest bytes that a grain of `grain_bytes` takes in the file, with its marker.
pub(crate) fn stored_max(grain_bytes: u64) -> Result<u64> {
    add(mul(grain_bytes, 2)?, GRAIN_MARKER_BYTES)
}

/// Decodes one grain, knowing where on the disk it must belong.
pub(crate) struct GrainCodec {
    pub zlib: Arc<dyn Codec>,
    pub framing: Framing,
    /// Sector in the extent.
    pub sector: u64,
    /// Sector on the whole disk (differs only in disks of several extents; writers disagree).
    pub disk_sector: u64,
}

impl GrainCodec {
    /// The zlib data in `stored`.
    fn payload<'a>(&self, stored: &'a [u8], grain_bytes: usize) -> Result<&'a [u8]> {
        let (skip, len) = match self.framing {
            Framing::Marker => (GRAIN_MARKER_BYTES, u64::from(self.check_marker(stored)?)),
            Framing::Bare => bare(stored),
        };
        let max = wide(grain_bytes).saturating_mul(2);
        if len == 0 || len > max {
            return Err(damaged("a compressed grain of this length cannot be", "grain marker size")
                .found(len)
                .allowed(format!("1 to {max}")));
        }
        let (start, end) = (index(skip)?, index(add(skip, len)?)?);
        stored.get(start..end).ok_or_else(|| {
            damaged(
                "a compressed grain runs into what follows it, or past the end of the file",
                "grain marker size",
            )
            .found(len)
            .allowed(format!("up to {}", wide(stored.len()).saturating_sub(skip)))
        })
    }

    fn check_marker(&self, stored: &[u8]) -> Result<u32> {
        let cut = || damaged("the file ends inside a grain marker", "grain marker").found(stored.len());
        let head: [u8; 12] = array(stored, 0).ok_or_else(cut)?;
        let mut bytes = [0u8; size_of::<Marker>()];
        if let Some(start) = bytes.get_mut(..12) {
            start.copy_from_slice(&head);
        }
        let marker = Marker::read_from_bytes(&bytes).map_err(|_| cut())?;
        let found = marker.val.get();
        if found != self.sector && found != self.disk_sector {
            return Err(damaged("the grain belongs to another place on the disk", "grain marker val")
                .found(format!("sector {found}"))
                .allowed(format!("sector {}", self.sector)));
        }
        Ok(marker.size.get())
    }
}

/// Where the data of a grain without marker begins and how long it is.
fn bare(stored: &[u8]) -> (u64, u64) {
    let is_zlib = |at: usize| {
        array::<2>(stored, at).is_some_and(|bytes| {
            let [method, _] = bytes;
            method & 0x0f == 8 && u16::from_be_bytes(bytes).checked_rem(31) == Some(0)
        })
    };
    match array::<4>(stored, 0).map(u32::from_le_bytes) {
        Some(len) if is_zlib(4) && u64::from(len) <= wide(stored.len()) => (4, len.into()),
        _ => (0, wide(stored.len())),
    }
}

fn damaged(message: &str, field: &'static str) -> Error {
    Error::new(Code::Corrupt, message)
        .field(field)
        .hint("the grain is damaged; restore it from a backup or another copy of the image")
}

impl Codec for GrainCodec {
    fn name(&self) -> &'static str {
        "zlib"
    }
    fn decode(&self, encoded: &[u8], block: &mut [u8]) -> Result<()> {
        self.zlib.decode(self.payload(encoded, block.len())?, block)
    }
    fn encode(&self, block: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
        self.zlib.encode(block, out, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codec(framing: Framing) -> GrainCodec {
        GrainCodec { zlib: vellum_codec::zlib(None).unwrap(), framing, sector: 0x180, disk_sector: 0x980 }
    }

    fn stored(val: u64, size: Option<u32>, data: &[u8]) -> Vec<u8> {
        let size = size.unwrap_or(data.len() as u32);
        [&val.to_le_bytes()[..], &size.to_le_bytes(), data].concat()
    }

    fn compressed(block: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(codec(Framing::Marker).encode(block, &mut out, 2 * block.len()).unwrap());
        out
    }

    #[test]
    fn a_grain_is_decoded_behind_its_marker_whatever_follows() {
        let block: Vec<u8> = (0..65536u32).map(|i| (i / 100) as u8).collect();
        let data = compressed(&block);
        for val in [0x180, 0x980] {
            let mut bytes = stored(val, None, &data);
            bytes.extend_from_slice(&[0xee; 3000]);
            let mut out = vec![1u8; 65536];
            codec(Framing::Marker).decode(&bytes, &mut out).unwrap();
            assert_eq!(out, block);
        }
    }

    #[test]
    fn a_short_last_grain_is_filled_with_zeros() {
        let mut out = vec![1u8; 4096];
        let bytes = stored(0x180, None, &compressed(&[7u8; 1000]));
        codec(Framing::Marker).decode(&bytes, &mut out).unwrap();
        assert!(out[..1000] == [7; 1000] && out[1000..].iter().all(|b| *b == 0));
    }

    #[test]
    fn markers_that_lie_are_errors() {
        let data = compressed(&[7u8; 4096]);
        let mut out = vec![0u8; 4096];
        for (bytes, field) in [
            (stored(0x181, None, &data), "grain marker val"),
            (stored(0x180, Some(0), &data), "grain marker size"),
            (stored(0x180, Some(8193), &data), "grain marker size"),
            (stored(0x180, Some(data.len() as u32 + 1), &data), "grain marker size"),
            (stored(0x180, None, &data)[..11].to_vec(), "grain marker"),
            (Vec::new(), "grain marker"),
        ] {
            let error = codec(Framing::Marker).decode(&bytes, &mut out).unwrap_err();
            assert_eq!((error.code(), error.field_name()), (Code::Corrupt, Some(field)));
        }
        let bomb = stored(0x180, None, &compressed(&[7u8; 1 << 20]));
        assert_eq!(codec(Framing::Marker).decode(&bomb, &mut out).unwrap_err().code(), Code::Decompress);
    }

    #[test]
    fn grains_without_marker_are_read_with_and_without_length() {
        let data = compressed(&[7u8; 4096]);
        let with_length = [&(data.len() as u32).to_le_bytes()[..], &data, &[9; 50]].concat();
        for bytes in [data, with_length] {
            let mut out = vec![0u8; 4096];
            codec(Framing::Bare).decode(&bytes, &mut out).unwrap();
            assert_eq!(out, [7u8; 4096]);
        }
    }
}
