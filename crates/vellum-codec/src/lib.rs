//! Compression codecs of virtual disk formats: raw deflate and zstd (QCOW2), zlib (VMDK).
//!
//! Each block stands alone. A decoder writes exactly one block and never more, whatever the input says; contexts are
//! pooled, so that a block costs no allocation.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

use libdeflater::{CompressionError, CompressionLvl, Compressor, DecompressionError, Decompressor};
use parking_lot::Mutex;
use std::sync::Arc;
use vellum_core::{Code, Codec, Error, Result};

/// Level of raw deflate when none is asked for: several times faster than QEMU (zlib 6 with a 4 KiB window) at its size.
pub const DEFLATE_LEVEL_DEFAULT: i32 = 1;
/// Level of zlib when none is asked for: VMDK's peers compress with the whole window, so 1 would be 7 % larger than theirs.
pub const ZLIB_LEVEL_DEFAULT: i32 = 3;
/// Levels that deflate and zlib take (libdeflate's scale).
pub const DEFLATE_LEVELS: std::ops::RangeInclusive<i32> = 1..=12;
/// Level of zstd when none is asked for: QEMU's, so that results are as small as its.
pub const ZSTD_LEVEL_DEFAULT: i32 = 3;
/// Levels that zstd takes.
pub const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// Raw deflate without any frame (RFC 1951), as in QCOW2.
pub fn deflate(level: Option<i32>) -> Result<Arc<dyn Codec>> {
    Deflate::make("deflate", Frame::Raw, false, level.unwrap_or(DEFLATE_LEVEL_DEFAULT))
}

/// zlib (RFC 1950), as in VMDK. Its last block may decode short; the rest is zero.
pub fn zlib(level: Option<i32>) -> Result<Arc<dyn Codec>> {
    Deflate::make("zlib", Frame::Zlib, true, level.unwrap_or(ZLIB_LEVEL_DEFAULT))
}

/// zstd, one or more frames, as in QCOW2.
pub fn zstd(level: Option<i32>) -> Result<Arc<dyn Codec>> {
    let level = check_level("zstd", level.unwrap_or(ZSTD_LEVEL_DEFAULT), ZSTD_LEVELS)?;
    Ok(Arc::new(Zstd { level, encoders: Pool::default(), decoders: Pool::default() }))
}

fn check_level(name: &str, level: i32, allowed: std::ops::RangeInclusive<i32>) -> Result<i32> {
    if allowed.contains(&level) {
        return Ok(level);
    }
    Err(Error::new(Code::Usage, format!("{name} has no compression level {level}")).allowed(format!(
        "{} to {}",
        allowed.start(),
        allowed.end()
    )))
}

/// Contexts that are made when needed and kept for the next block.
struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool(Mutex::new(Vec::new()))
    }
}

impl<T> Pool<T> {
    fn with<R>(&self, make: impl FnOnce() -> Result<T>, work: impl FnOnce(&mut T) -> R) -> Result<R> {
        let spare = self.0.lock().pop();
        let mut context = match spare {
            Some(context) => context,
            None => make()?,
        };
        let result = work(&mut context);
        self.0.lock().push(context);
        Ok(result)
    }
}

const RESTORE: &str = "the block is damaged; restore it from a backup or another copy of the image";

#[cold]
fn broken(name: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Code::Decompress, format!("a {name} block cannot be decompressed: {why}")).hint(RESTORE)
}

#[cold]
fn wrong_length(name: &'static str, found: usize, wanted: usize) -> Error {
    Error::new(Code::Decompress, format!("a {name} block decompresses to the wrong length"))
        .found(found)
        .allowed(wanted)
        .hint(RESTORE)
}

enum Frame {
    Raw,
    Zlib,
}

struct Deflate {
    name: &'static str,
    frame: Frame,
    short_allowed: bool,
    level: CompressionLvl,
    encoders: Pool<Compressor>,
    decoders: Pool<Decompressor>,
}

impl Deflate {
    fn make(name: &'static str, frame: Frame, short_allowed: bool, level: i32) -> Result<Arc<dyn Codec>> {
        let level = check_level(name, level, DEFLATE_LEVELS)?;
        let level = CompressionLvl::new(level)
            .map_err(|_| Error::new(Code::Usage, format!("{name} has no compression level {level}")))?;
        Ok(Arc::new(Deflate {
            name,
            frame,
            short_allowed,
            level,
            encoders: Pool::default(),
            decoders: Pool::default(),
        }))
    }
}

impl Codec for Deflate {
    fn name(&self) -> &'static str {
        self.name
    }

    fn decode(&self, encoded: &[u8], block: &mut [u8]) -> Result<()> {
        let wanted = block.len();
        let done = self.decoders.with(
            || Ok(Decompressor::new()),
            |decoder| match self.frame {
                Frame::Raw => decoder.deflate_decompress(encoded, block),
                Frame::Zlib => decoder.zlib_decompress(encoded, block),
            },
        )?;
        match done {
            Ok(len) if len == wanted => Ok(()),
            Ok(len) if self.short_allowed => {
                if let Some(rest) = block.get_mut(len..) {
                    rest.fill(0);
                }
                Ok(())
            }
            Ok(len) => Err(wrong_length(self.name, len, wanted)),
            Err(DecompressionError::BadData) => Err(broken(self.name, "the data is invalid")),
            Err(DecompressionError::InsufficientSpace) => {
                Err(broken(self.name, "it holds more than one block"))
            }
        }
    }

    fn encode(&self, block: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
        out.clear();
        out.resize(limit, 0);
        let done = self.encoders.with(
            || Ok(Compressor::new(self.level)),
            |encoder| match self.frame {
                Frame::Raw => encoder.deflate_compress(block, out),
                Frame::Zlib => encoder.zlib_compress(block, out),
            },
        )?;
        match done {
            Ok(len) => {
                out.truncate(len);
                Ok(true)
            }
            Err(CompressionError::InsufficientSpace) => Ok(false),
        }
    }
}

struct Zstd {
    level: i32,
    encoders: Pool<zstd::bulk::Compressor<'static>>,
    decoders: Pool<zstd::bulk::Decompressor<'static>>,
}

impl Codec for Zstd {
    fn name(&self) -> &'static str {
        "zstd"
    }

    fn decode(&self, encoded: &[u8], block: &mut [u8]) -> Result<()> {
        let wanted = block.len();
        let mut source = encoded;
        let mut done = 0;
        // One-shot decoding of whole frames needs no window memory, whatever window a frame declares.
        while done < wanted {
            let frame = zstd::zstd_safe::find_frame_compressed_size(source)
                .map_err(|code| broken("zstd", zstd::zstd_safe::get_error_name(code)))?;
            let (Some(now), Some(later), Some(target)) =
                (source.get(..frame), source.get(frame..), block.get_mut(done..))
            else {
                return Err(broken("zstd", "the frame is cut off"));
            };
            let len = self
                .decoders
                .with(
                    || zstd::bulk::Decompressor::new().map_err(|e| Error::from_io(e, "zstd has no memory")),
                    |decoder| decoder.decompress_to_buffer(now, target),
                )?
                .map_err(|e| broken("zstd", e))?;
            if len == 0 && now.is_empty() {
                return Err(broken("zstd", "the frame is empty"));
            }
            done = done.saturating_add(len);
            source = later;
        }
        if done == wanted { Ok(()) } else { Err(wrong_length("zstd", done, wanted)) }
    }

    fn encode(&self, block: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool> {
        out.clear();
        out.resize(limit, 0);
        let done = self.encoders.with(
            || zstd::bulk::Compressor::new(self.level).map_err(|e| Error::from_io(e, "zstd has no memory")),
            |encoder| encoder.compress_to_buffer(block, out.as_mut_slice()),
        )?;
        match done {
            Ok(len) => {
                out.truncate(len);
                Ok(true)
            }
            // The only failure of a one-shot compression with valid parameters is a full target.
            Err(_) => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        (0..65536u32).map(|i| (i.wrapping_mul(2654435761) >> 27) as u8).collect()
    }

    fn all() -> Vec<Arc<dyn Codec>> {
        vec![deflate(None).unwrap(), zlib(None).unwrap(), zstd(None).unwrap()]
    }

    #[test]
    fn what_is_encoded_decodes_even_with_bytes_behind_it() {
        for codec in all() {
            let mut encoded = Vec::new();
            assert!(codec.encode(&sample(), &mut encoded, 65536).unwrap());
            encoded.extend_from_slice(&[0xa5; 700]);
            let mut block = vec![1u8; 65536];
            codec.decode(&encoded, &mut block).unwrap();
            assert_eq!(block, sample(), "{}", codec.name());
        }
    }

    #[test]
    fn what_does_not_fit_says_so() {
        for codec in all() {
            let mut encoded = Vec::new();
            assert!(!codec.encode(&sample(), &mut encoded, 100).unwrap(), "{}", codec.name());
        }
    }

    #[test]
    fn a_bomb_a_cut_and_garbage_are_errors() {
        for codec in all() {
            let mut encoded = Vec::new();
            assert!(codec.encode(&[0u8; 1 << 20], &mut encoded, 65536).unwrap());
            let mut block = vec![1u8; 65536];
            assert_eq!(codec.decode(&encoded, &mut block).unwrap_err().code(), Code::Decompress);
            let mut whole = vec![0u8; 1 << 20];
            assert!(codec.decode(&encoded[..encoded.len() / 2], &mut whole).is_err());
            assert!(codec.decode(&[0xff; 64], &mut block).is_err());
            assert!(codec.decode(&[], &mut block).is_err());
        }
    }

    #[test]
    fn a_short_block_is_an_error_but_for_zlib() {
        for (codec, short_allowed) in all().into_iter().zip([false, true, false]) {
            let mut encoded = Vec::new();
            assert!(codec.encode(&[7u8; 1000], &mut encoded, 65536).unwrap());
            let mut block = vec![1u8; 2000];
            let result = codec.decode(&encoded, &mut block);
            assert_eq!(result.is_ok(), short_allowed, "{}", codec.name());
            if short_allowed {
                assert!(block[..1000] == [7; 1000] && block[1000..] == [0; 1000]);
            }
        }
    }

    #[test]
    fn levels_out_of_range_are_refused() {
        assert!(deflate(Some(0)).is_err() && zlib(Some(13)).is_err() && zstd(Some(99)).is_err());
    }
}
