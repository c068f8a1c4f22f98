//! Descriptors that this process was started with.

use crate::error::{ErrorKind, error};
use parking_lot::Mutex;
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Between the look at a descriptor's flags and the change of them.
static TAKING: Mutex<()> = Mutex::new(());

/// Takes over the descriptor with that number, and has it closed when this process executes another program.
///
/// Whether it was inherited is told by its close-on-exec flag: it would not have lived through the start of this program
/// with it, and all that this program opens through Rust's libraries has it. So the same descriptor is not taken twice.
/// Standard input, output and error belong to the standard library too: of them, a copy is made.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(error(ErrorKind::WrongDescriptor, format!("{number} is no number of a descriptor")));
    }
    let _taking = TAKING.lock();
    // SAFETY: the borrow ends with this function. That nobody closes the descriptor meanwhile follows, for 0 to 2, from
    // the standard library, which leaves them open; for others from the flag looked at first: see below. If the number
    // is not open at all, the kernel answers EBADF to the first call and nothing else is done with it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed).map_err(|error| not_open(number, error))?;
    if number <= 2 {
        return Ok(fcntl_dupfd_cloexec(borrowed, 3)?);
    }
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(error(
            ErrorKind::WrongDescriptor,
            format!(
                "descriptor {number} was not inherited (it is this process's own, or taken already): pass it without \
                 its close-on-exec flag, and name it once"
            ),
        ));
    }
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open and had no close-on-exec flag, so it came from whoever started this program and no
    // object of this program owns it: this one does from here on. A second caller finds the flag, set under `TAKING`.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn not_open(number: RawFd, cause: Errno) -> io::Error {
    crate::Error::new(
        ErrorKind::WrongDescriptor,
        format!("descriptor {number} is not open: pass it when starting this program"),
    )
    .because(io::Error::from(cause))
    .into()
}

/// What a descriptor is, in words.
pub(crate) fn type_of(fd: &impl AsFd) -> io::Result<&'static str> {
    Ok(match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Socket => "socket",
        FileType::RegularFile => "file",
        FileType::Fifo => "pipe",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Directory => "directory",
        _ => "descriptor of another kind",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::kind_of;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn only_what_is_inherited_is_taken_and_only_once() {
        let own = std::fs::File::open("/dev/null").expect("a file");
        let refused = take(own.as_raw_fd()).expect_err("this process's own");
        assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor));
        fcntl_setfd(&own, FdFlags::empty()).expect("as if inherited");
        let number = own.into_raw_fd();
        let taken = take(number).expect("inherited");
        assert_eq!(taken.as_raw_fd(), number);
        assert!(fcntl_getfd(&taken).expect("flags").contains(FdFlags::CLOEXEC));
        assert!(take(number).is_err(), "taken already");
    }

    #[test]
    fn standard_streams_are_copied() {
        let copy = take(2).expect("standard error");
        assert!(copy.as_raw_fd() > 2);
    }

    #[test]
    fn what_is_not_open_is_refused() {
        let refused = take(1 << 20).expect_err("not open");
        assert!(refused.to_string().contains("is not open"), "{refused}");
        assert!(take(-1).is_err());
    }

    #[test]
    fn types_are_told() {
        let (read, _write) = std::io::pipe().expect("a pipe");
        assert_eq!(type_of(&read).expect("type"), "pipe");
        let file = std::fs::File::open("/dev/null").expect("a file");
        assert_eq!(type_of(&file).expect("type"), "character device");
    }
}
