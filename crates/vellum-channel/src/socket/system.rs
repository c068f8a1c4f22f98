//! Calls to the kernel that no library wraps as this crate needs them: all `unsafe` of sockets is here.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A range of zero-copy sends that the kernel is through with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    /// How many sends.
    pub sends: u32,
    /// Whether the kernel copied them after all.
    pub is_copied: bool,
}

/// `SO_EE_ORIGIN_ZEROCOPY`, `SO_EE_CODE_ZEROCOPY_COPIED` of `linux/errqueue.h`.
const ORIGIN_ZERO_COPY: u8 = 5;
const CODE_COPIED: u8 = 1;

/// Space for the control messages of one entry of the error queue: `sock_extended_err` and an address, twice over.
const ERROR_SPACE: usize = 256;

/// Memory for control messages, aligned as their headers must be.
#[repr(C, align(8))]
struct ControlSpace([MaybeUninit<u8>; ERROR_SPACE]);

/// Takes one entry off the error queue: `WouldBlock` when it is empty, `None` when it tells of something else than
/// zero-copy sends.
pub(super) fn receive_completion(fd: BorrowedFd<'_>) -> io::Result<Option<Completion>> {
    let mut space = ControlSpace([MaybeUninit::uninit(); ERROR_SPACE]);
    let mut header = empty_header();
    header.msg_control = space.0.as_mut_ptr().cast();
    header.msg_controllen = ERROR_SPACE as _;
    // SAFETY: `header` names no address, no data and a control buffer of `ERROR_SPACE` bytes, which is exclusively
    // borrowed here and outlives the call; the descriptor is borrowed, hence open.
    let received =
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = None;
    // SAFETY: the kernel filled the buffer that `header` names with whole control messages and set `msg_controllen` to
    // their length; the buffer is still there, and aligned for a `cmsghdr` by `ControlSpace`.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR answer null or a pointer to a whole header within the buffer.
        let head = unsafe { message.read() };
        let is_error = matches!(
            (head.cmsg_level, head.cmsg_type),
            (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
        );
        // SAFETY: CMSG_LEN only adds.
        let needed = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as u32) } as usize;
        if is_error && head.cmsg_len as usize >= needed {
            // SAFETY: the message is at least as long as its header and a `sock_extended_err`, by the check of its
            // length, which the kernel keeps within the buffer. Any bytes are a valid `sock_extended_err`.
            let error =
                unsafe { libc::CMSG_DATA(message).cast::<libc::sock_extended_err>().read_unaligned() };
            found = completion(&error).or(found);
        }
        // SAFETY: as for CMSG_FIRSTHDR; `message` came from there or from here.
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    Ok(found)
}

/// The sends that an entry tells of: those numbered from `ee_info` to `ee_data`, in a circle of 32 bits.
fn completion(error: &libc::sock_extended_err) -> Option<Completion> {
    let is_ours = error.ee_errno == 0 && error.ee_origin == ORIGIN_ZERO_COPY;
    is_ours.then(|| Completion {
        sends: error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1),
        is_copied: error.ee_code & CODE_COPIED != 0,
    })
}

/// Receives into memory that need not be initialised: the bytes received, which are at its start and are initialised now,
/// and whether control messages were thrown away (`MSG_CTRUNC`). Descriptors that come along are closed by the kernel.
pub(super) fn receive(fd: BorrowedFd<'_>, room: &mut [MaybeUninit<u8>]) -> io::Result<(usize, bool)> {
    let mut slice = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    let mut header = empty_header();
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    // SAFETY: `header` names no address, no control buffer and one slice, that of `room`, which is exclusively borrowed
    // for the call; the kernel writes at most its length there. The descriptor is borrowed, hence open.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    match usize::try_from(received) {
        Ok(count) => Ok((count, header.msg_flags & libc::MSG_CTRUNC != 0)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn empty_header() -> libc::msghdr {
    // SAFETY: null pointers and zero lengths are what an empty `msghdr` is made of.
    unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() }
}

/// Sets an option of `SOL_SOCKET` that is a whole number.
fn set_option(fd: BorrowedFd<'_>, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes at the pointer, which is that of a living `c_int` of that size.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const value).cast(), length)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads an option of `SOL_SOCKET` into a `T`, which must be plain numbers.
///
/// # Safety
/// Any bytes must be a valid `T`.
unsafe fn option<T>(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes at the pointer, the size of `value`, which outlives the call.
    let got = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, value.as_mut_ptr().cast(), &raw mut length)
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all of it was zeroed, the kernel wrote over some or all of that, and any bytes are a valid `T`.
    Ok(unsafe { value.assume_init() })
}

/// Whether zero-copy sends are allowed on the socket.
pub(super) fn is_zero_copy(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: any bytes are a number.
    unsafe { option::<libc::c_int>(fd, libc::SO_ZEROCOPY) }.map(|value| value != 0)
}

/// Allows zero-copy sends on the socket.
pub(super) fn allow_zero_copy(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::SO_ZEROCOPY, 1)
}

/// Has the kernel pass no descriptors on its own account (`SO_PASSPIDFD`): nobody here would close them.
pub(super) fn refuse_process_descriptors(fd: BorrowedFd<'_>) {
    // Kernels that do not know the option do not pass any.
    let _ = set_option(fd, libc::SO_PASSPIDFD, 0);
}

/// The process at the other end of a Unix socket. (Not rustix's: its process identifiers are never 0, which the kernel
/// gives for a process that this one's namespace does not see.)
pub(super) fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<libc::ucred> {
    // SAFETY: `ucred` is three numbers.
    unsafe { option::<libc::ucred>(fd, libc::SO_PEERCRED) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn entry(info: u32, data: u32, code: u8) -> libc::sock_extended_err {
        libc::sock_extended_err {
            ee_errno: 0,
            ee_origin: ORIGIN_ZERO_COPY,
            ee_type: 0,
            ee_code: code,
            ee_pad: 0,
            ee_info: info,
            ee_data: data,
        }
    }

    #[test]
    fn a_completion_counts_its_range_round_the_circle() {
        for (info, data, sends) in [(0, 0, 1), (3, 9, 7), (u32::MAX, 0, 2), (u32::MAX - 1, u32::MAX, 2)] {
            let found = completion(&entry(info, data, 0)).expect("a completion");
            assert_eq!(found, Completion { sends, is_copied: false }, "{info}..={data}");
        }
        assert!(completion(&entry(0, 0, CODE_COPIED)).expect("a completion").is_copied);
        let mut other = entry(0, 0, 0);
        other.ee_origin = 2; // ICMP
        assert_eq!(completion(&other), None);
        let mut failed = entry(0, 0, 0);
        failed.ee_errno = 111;
        assert_eq!(completion(&failed), None);
    }

    #[test]
    fn uninitialised_memory_is_filled_from_its_start() {
        let (near, far) = UnixStream::pair().expect("a pair");
        far.set_nonblocking(true).expect("a mode");
        let mut room = [MaybeUninit::uninit(); 16];
        let empty = receive(far.as_fd(), &mut room).expect_err("nothing is there");
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        rustix::io::write(&near, b"seven b").expect("a write");
        assert_eq!(receive(far.as_fd(), &mut room).expect("bytes"), (7, false));
        // SAFETY: the seven bytes were received.
        let got: Vec<u8> = room[..7].iter().map(|byte| unsafe { byte.assume_init() }).collect();
        assert_eq!(got, b"seven b");
        drop(near);
        assert_eq!(receive(far.as_fd(), &mut room).expect("the end"), (0, false));
    }
}
