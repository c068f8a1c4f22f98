//! The system calls that `rustix` does not have.
#![allow(unsafe_code)]

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::{Errno, retry_on_intr};
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

/// Somebody else's lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    /// The process that holds it; `None` for a lock that belongs to an open file.
    pub(crate) pid: Option<u32>,
}

/// Takes a shared lock on `len` bytes for the open file; `AGAIN` or `ACCESS` if somebody has a write lock there.
pub(crate) fn lock_shared(fd: BorrowedFd<'_>, start: u64, len: u64) -> rustix::io::Result<()> {
    open_file_lock(fd, libc::F_OFD_SETLK, libc::F_RDLCK, start, len).map(|_| ())
}

/// Lets the locks of the open file on `len` bytes go.
pub(crate) fn unlock(fd: BorrowedFd<'_>, start: u64, len: u64) -> rustix::io::Result<()> {
    open_file_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, start, len).map(|_| ())
}

/// A lock of anyone but this open file on the byte, if there is one.
pub(crate) fn find_lock(fd: BorrowedFd<'_>, byte: u64) -> rustix::io::Result<Option<Found>> {
    let found = open_file_lock(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
    let is_free = libc::c_int::from(found.l_type) == libc::F_UNLCK;
    Ok((!is_free).then(|| Found { pid: u32::try_from(found.l_pid).ok().filter(|pid| *pid != 0) }))
}

/// `fcntl` with a lock of the open file ("open file description lock", Linux 3.15). Never waits.
fn open_file_lock(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    start: u64,
    len: u64,
) -> rustix::io::Result<libc::flock> {
    let (Ok(l_type), Ok(l_whence)) = (i16::try_from(kind), i16::try_from(libc::SEEK_SET)) else {
        return Err(Errno::INVAL);
    };
    let (Ok(l_start), Ok(l_len)) = (libc::off_t::try_from(start), libc::off_t::try_from(len)) else {
        return Err(Errno::OVERFLOW);
    };
    // The kernel wants `l_pid` to be zero for these locks.
    let mut lock = libc::flock { l_type, l_whence, l_start, l_len, l_pid: 0 };
    retry_on_intr(|| {
        // SAFETY: these commands take a pointer to a `struct flock`, which `libc::flock` is, read it and write it back
        // during the call only; `lock` is exclusively borrowed here and outlives the call. The descriptor is borrowed,
        // hence open.
        match unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) } {
            -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
            _ => Ok(()),
        }
    })?;
    Ok(lock)
}
