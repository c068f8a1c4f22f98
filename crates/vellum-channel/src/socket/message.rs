//! Sending and receiving, with descriptors.

use super::{Kind, system};
use crate::channel::ReadFlags;
use crate::descriptors::{Descriptors, MESSAGE_DESCRIPTORS_MAX};
use crate::error::{ErrorKind, error};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Slices that the kernel takes in one call (`UIO_MAXIOV`).
pub(super) const SLICES_MAX: usize = 1024;

/// Bytes that the kernel transfers in one call at most (`MAX_RW_COUNT`, less than this by a page).
const TRANSFER_MAX: usize = 0x7fff_0000;

/// A read of that many bytes is mostly followed by more: the next one asks the kernel again rather than sleep, which costs
/// far less than to be woken.
const MUCH: usize = 16 << 10;

/// Reads with at most this room do not ask whether descriptors came along: that costs a few per cent of a round trip of
/// small messages. Who has so little room mostly knows what comes and fills it, and then the answer is of no use; if not,
/// [`is_drained`] is "unknown", and the next read finds the socket empty.
const SMALL_ROOM: usize = 4 << 10;

/// Space for the descriptors of one message, and credentials that an inherited socket may have been set to pass.
const CONTROL_SPACE: usize = rustix::cmsg_space!(ScmRights(MESSAGE_DESCRIPTORS_MAX), ScmCredentials(1));

/// A read: the bytes, and whether it left the socket empty.
pub(super) type Transfer = io::Result<(usize, bool)>;

/// Receives into `bufs`, which have `room` for some bytes. When an error comes after bytes have left the socket, their
/// number is in `unreported`, and they are in `bufs`.
pub(super) fn receive(
    fd: BorrowedFd<'_>,
    kind: Kind,
    bufs: &mut [IoSliceMut<'_>],
    room: usize,
    fds: Option<&mut Descriptors>,
    flags: ReadFlags,
    unreported: &mut usize,
) -> Transfer {
    let is_peek = flags.contains(ReadFlags::PEEK);
    let how = if is_peek { RecvFlags::PEEK } else { RecvFlags::empty() } | RecvFlags::CMSG_CLOEXEC;
    let (bytes, is_whole) = match (kind, fds) {
        // A peek would get the same descriptors again and again: it leaves them with the bytes.
        (Kind::Unix, Some(fds)) if !is_peek => return receive_with(fd, bufs, room, fds, flags, unreported),
        // The kernel closes the descriptors that nobody asks for, and says so.
        (Kind::Unix, _) if room <= SMALL_ROOM && bufs.len() == 1 => (recv(fd, &mut *bufs[0], how)?.0, false),
        (Kind::Unix, _) => {
            let got = recvmsg(fd, bufs, &mut RecvAncillaryBuffer::default(), how)?;
            (got.bytes, !got.flags.contains(ReturnFlags::CTRUNC))
        }
        (Kind::Tcp | Kind::Vsock, _) => match bufs {
            [buf] => (recv(fd, &mut **buf, how)?.0, true),
            bufs => (recvmsg(fd, bufs, &mut RecvAncillaryBuffer::default(), how)?.bytes, true),
        },
    };
    Ok((bytes, !is_peek && is_drained(kind, bytes, room, is_whole)))
}

/// Receives into memory that need not be initialised; `room` says how many bytes at its start are so now.
pub(super) fn receive_uninit(fd: BorrowedFd<'_>, kind: Kind, room: &mut [MaybeUninit<u8>]) -> Transfer {
    let (bytes, is_whole) = match kind {
        Kind::Unix if room.len() <= SMALL_ROOM => (recv(fd, &mut *room, RecvFlags::empty())?.1, false),
        Kind::Unix => {
            let (bytes, is_cut) = system::receive(fd, room)?;
            (bytes, !is_cut)
        }
        Kind::Tcp | Kind::Vsock => (recv(fd, &mut *room, RecvFlags::empty())?.1, true),
    };
    Ok((bytes, is_drained(kind, bytes, room.len(), is_whole)))
}

/// Whether a read of `bytes` where there was room for more proves that the socket was empty.
///
/// On TCP sockets it does, unless it brought [`MUCH`]. On Unix sockets the kernel also ends a read behind a message that carries descriptors or
/// credentials: it does unless there were some, which `is_whole` excludes. Of vsock nothing is known: it depends on what
/// is below.
fn is_drained(kind: Kind, bytes: usize, room: usize, is_whole: bool) -> bool {
    0 < bytes && bytes < room.min(MUCH) && is_whole && kind != Kind::Vsock
}

fn receive_with(
    fd: BorrowedFd<'_>,
    bufs: &mut [IoSliceMut<'_>],
    room: usize,
    fds: &mut Descriptors,
    flags: ReadFlags,
    unreported: &mut usize,
) -> Transfer {
    let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(fd, bufs, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    *unreported = got.bytes;
    let mut received = Vec::new();
    let mut has_control = false;
    for message in control.drain() {
        has_control = true;
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            received.extend(descriptors);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(error(
            ErrorKind::TooManyDescriptors,
            format!(
                "of the descriptors that the peer sent only {} could be received, and they were closed: this process has \
                 as many open as it may (see `ulimit -n`)",
                received.len()
            ),
        ));
    }
    if !received.is_empty() {
        if !flags.contains(ReadFlags::KEEP_DESCRIPTOR_MODE) {
            received.iter().try_for_each(make_blocking)?;
        }
        fds.add(received)?;
    }
    *unreported = 0;
    Ok((got.bytes, is_drained(Kind::Unix, got.bytes, room, !has_control)))
}

/// The sender may have had it non-blocking, and the mode belongs to what is open, not to the descriptor.
fn make_blocking(fd: &OwnedFd) -> io::Result<()> {
    let mode = fcntl_getfl(fd)?;
    if mode.contains(OFlags::NONBLOCK) {
        fcntl_setfl(fd, mode - OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// Sends from `bufs`, which have `total` bytes, with all of `fds`; says whether it left the socket full.
pub(super) fn transmit(
    fd: BorrowedFd<'_>,
    kind: Kind,
    bufs: &[IoSlice<'_>],
    total: usize,
    fds: &[BorrowedFd<'_>],
) -> Transfer {
    let sent = match (fds, bufs) {
        ([], [buf]) => send(fd, buf, SendFlags::NOSIGNAL)?,
        ([], bufs) => sendmsg(fd, bufs, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?,
        (fds, bufs) => {
            let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let is_too_many = fds.len() > MESSAGE_DESCRIPTORS_MAX;
            if is_too_many || !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(error(
                    ErrorKind::TooManyDescriptors,
                    format!("{} descriptors: one message carries {MESSAGE_DESCRIPTORS_MAX}", fds.len()),
                ));
            }
            sendmsg(fd, bufs, &mut control, SendFlags::NOSIGNAL)?
        }
    };
    Ok((sent, sent < total.min(TRANSFER_MAX) && kind != Kind::Vsock))
}

/// Sends from `bufs` without copying them.
pub(super) fn transmit_zero_copy(fd: BorrowedFd<'_>, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::from_bits_retain(libc::MSG_ZEROCOPY.unsigned_abs());
    Ok(sendmsg(fd, bufs, &mut SendAncillaryBuffer::default(), flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_proof_of_emptiness_counts() {
        for (kind, bytes, room, is_whole, drained) in [
            (Kind::Tcp, 5, 10, true, true),
            (Kind::Tcp, 10, 10, true, false),
            (Kind::Tcp, 0, 10, true, false),
            (Kind::Tcp, 0x7fff_f000, 0x8000_0000, true, false),
            (Kind::Unix, 5, 10, true, true),
            (Kind::Unix, 5, 10, false, false),
            (Kind::Vsock, 5, 10, true, false),
        ] {
            assert_eq!(is_drained(kind, bytes, room, is_whole), drained, "{kind:?} {bytes} of {room}");
        }
    }
}
