//! Several storages one after the other.

use crate::storage::past_end;
use crate::{
    Buf, Code, Completion, Error, Preallocate, Result, Status, Storage, StorageLimits, WithBuf, WriteFlags,
    ZeroMode,
};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Storages one after the other, as one storage of fixed length.
#[derive(Clone)]
pub struct Concat(Arc<Inner>);

struct Inner {
    parts: Vec<(u64, Arc<dyn Storage>)>,
    len: u64,
    name: String,
}

impl Concat {
    /// `parts` in order, each with the length that it has now.
    pub fn new(name: impl Into<String>, parts: Vec<Arc<dyn Storage>>) -> Result<Self> {
        let mut placed = Vec::with_capacity(parts.len());
        let mut len = 0u64;
        for part in parts {
            let start = len;
            len = len
                .checked_add(part.len()?)
                .ok_or_else(|| Error::new(Code::Overflow, "the parts together exceed 64 bits"))?;
            placed.push((start, part));
        }
        Ok(Concat(Arc::new(Inner { parts: placed, len, name: name.into() })))
    }

    /// The pieces of `range`: storage, range in it.
    fn split(&self, range: Range<u64>) -> Vec<(Arc<dyn Storage>, Range<u64>)> {
        let ends = self.0.parts.iter().skip(1).map(|(start, _)| *start).chain([self.0.len]);
        self.0
            .parts
            .iter()
            .zip(ends)
            .filter_map(|((start, part), end)| {
                let (from, to) = (range.start.max(*start), range.end.min(end));
                (from < to).then(|| (part.clone(), from - start..to - start))
            })
            .collect()
    }

    fn check(&self, offset: u64, len: usize) -> Result<Range<u64>> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.0.len => Ok(offset..end),
            _ => Err(past_end(&self.0.name, offset, len, self.0.len)),
        }
    }

    fn transfer(&self, mut buf: Buf, offset: u64, write: Option<WriteFlags>) -> Completion<WithBuf> {
        let range = match self.check(offset, buf.len()) {
            Ok(range) => range,
            Err(error) => return Completion::ready((buf, Err(error))),
        };
        let pieces = self.split(range);
        if let [(part, inner)] = &pieces[..] {
            return match write {
                None => part.read_at(buf, inner.start),
                Some(flags) => part.write_at(buf, inner.start, flags),
            };
        }
        let steps = async move {
            let window = buf.window();
            let mut at = window.start;
            for (part, inner) in pieces {
                let len = (inner.end - inner.start) as usize;
                buf.set_window(at..at + len);
                at += len;
                let (back, result) = match write {
                    None => part.read_at(buf, inner.start).await,
                    Some(flags) => part.write_at(buf, inner.start, flags).await,
                };
                buf = back;
                if let Err(error) = result {
                    buf.set_window(window);
                    return (buf, Err(error));
                }
            }
            buf.set_window(window);
            (buf, Ok(()))
        };
        match write {
            None => Completion::from_future(steps),
            // A write runs to its end even if nobody waits for it.
            Some(_) => Completion::started(steps),
        }
    }
}

impl Storage for Concat {
    fn name(&self) -> &str {
        &self.0.name
    }
    fn len(&self) -> Result<u64> {
        Ok(self.0.len)
    }
    fn limits(&self) -> StorageLimits {
        let all = || self.0.parts.iter().map(|(_, part)| part.limits());
        StorageLimits {
            alignment: all().map(|l| l.alignment).max().unwrap_or(1),
            granularity: all().map(|l| l.granularity).max().unwrap_or(4096),
            read_only: all().any(|l| l.read_only),
            resizable: false,
            knows_holes: all().any(|l| l.knows_holes),
        }
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        self.transfer(buf, offset, None)
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        self.transfer(buf, offset, Some(flags))
    }
    fn flush(&self) -> Completion<Result<()>> {
        let whole = self.clone();
        Completion::started(async move {
            for (_, part) in &whole.0.parts {
                part.flush().await?;
            }
            Ok(())
        })
    }
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        let pieces = self.split(range);
        Completion::started(async move {
            for (part, inner) in pieces {
                part.zero(inner, mode).await?;
            }
            Ok(())
        })
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        let pieces = self.split(range);
        Completion::started(async move {
            for (part, inner) in pieces {
                part.discard(inner).await?;
            }
            Ok(())
        })
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<crate::StatusList>> {
        // One part's answer is enough: callers go on from where it stops.
        let Some((part, inner)) = self.split(range.clone()).into_iter().next() else {
            return Completion::ready(Ok(vec![(range, Status::Hole)]));
        };
        let shift = range.start - inner.start;
        let status = part.status(inner);
        Completion::from_future(async move {
            Ok(status.await?.into_iter().map(|(r, s)| (r.start + shift..r.end + shift, s)).collect())
        })
    }
    fn set_len(&self, _len: u64, _preallocate: Preallocate) -> Completion<Result<()>> {
        Completion::ready(Err(
            Error::new(Code::Usage, "a concatenation cannot change its length").image(&self.0.name)
        ))
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Memory;

    #[test]
    fn requests_cross_the_borders() {
        let parts: Vec<Arc<dyn Storage>> = [&b"abc"[..], b"", b"defg", b"h"]
            .iter()
            .map(|b| Arc::new(Memory::from_bytes("p", b)) as _)
            .collect();
        let whole = Concat::new("whole", parts).unwrap();
        let (buf, result) = whole.read_at(Buf::zeroed(6), 2).wait();
        result.unwrap();
        assert_eq!(&*buf, b"cdefgh");
        whole.write_at(Buf::copy_of(b"XYZ"), 2, WriteFlags::default()).wait().1.unwrap();
        assert_eq!(&*whole.read_at(Buf::zeroed(8), 0).wait().0, b"abXYZfgh");
        assert!(whole.read_at(Buf::zeroed(2), 7).wait().1.is_err());
    }
}
