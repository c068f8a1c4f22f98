//! The two system calls that `rustix` does not have.
#![allow(unsafe_code)]

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::ioctl;
use std::ops::Range;

/// `struct file_clone_range` of `ioctl_ficlonerange(2)`.
#[repr(C)]
struct FileCloneRange {
    source_fd: i64,
    source_offset: u64,
    source_length: u64,
    target_offset: u64,
}

const FICLONERANGE: ioctl::Opcode = ioctl::opcode::write::<FileCloneRange>(0x94, 13);

/// Lets `len` bytes of `target` share the blocks of `source`.
pub(crate) fn clone_range(
    source: BorrowedFd<'_>,
    source_offset: u64,
    target: BorrowedFd<'_>,
    offset: u64,
    len: u64,
) -> rustix::io::Result<()> {
    let request = FileCloneRange {
        source_fd: i64::from(source.as_raw_fd()),
        source_offset,
        source_length: len,
        target_offset: offset,
    };
    // SAFETY: FICLONERANGE takes a pointer to `struct file_clone_range`, which `FileCloneRange` mirrors field by
    // field, and only reads it; `Setter` passes a pointer to the value for the length of the call.
    let request = unsafe { ioctl::Setter::<{ FICLONERANGE }, FileCloneRange>::new(request) };
    // SAFETY: as above; both descriptors are borrowed, hence open, for the length of the call.
    unsafe { ioctl::ioctl(target, request) }
}

/// Starts writing dirty pages of `range` to the disk, without waiting for them. Advice: errors are left to `flush`.
pub(crate) fn start_writeback(fd: BorrowedFd<'_>, range: Range<u64>) {
    let (Ok(offset), Ok(len)) =
        (i64::try_from(range.start), i64::try_from(range.end.saturating_sub(range.start)))
    else {
        return;
    };
    if len == 0 {
        return; // zero would mean: to the end of the file
    }
    // SAFETY: the call takes numbers only, and the descriptor is borrowed, hence open. SYNC_FILE_RANGE_WRITE alone
    // neither waits nor takes an error away that a later fsync must report.
    let _ = unsafe { libc::sync_file_range(fd.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}
