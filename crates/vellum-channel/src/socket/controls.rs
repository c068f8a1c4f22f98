//! What acts on a socket from any thread.

use super::Kind;
use crate::channel::Shutdown;
use crate::control::Controls;
use crate::poll_fd::closed;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::sockopt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};

/// Acts on the socket as long as it is open.
#[derive(Debug)]
pub(super) struct SocketControls {
    fd: Weak<OwnedFd>,
    kind: Kind,
    is_read_ended: AtomicBool,
    is_write_ended: AtomicBool,
    /// The task that waits to write. The kernel does not wake it on a full Unix socket when its writing is shut down.
    writer: Mutex<Option<Waker>>,
}

impl SocketControls {
    pub fn new(fd: Weak<OwnedFd>, kind: Kind) -> Self {
        Self {
            fd,
            kind,
            is_read_ended: AtomicBool::new(false),
            is_write_ended: AtomicBool::new(false),
            writer: Mutex::new(None),
        }
    }

    /// Whether reads find the end of the stream from now on. The kernel would go on to give what a TCP peer sends later.
    pub fn is_read_ended(&self) -> bool {
        self.is_read_ended.load(Ordering::Acquire)
    }

    /// Whether writing was shut down; if not, `cx` is woken when it is.
    pub fn poll_write_ended(&self, cx: &Context<'_>) -> bool {
        let mut writer = self.writer.lock();
        if self.is_write_ended.load(Ordering::Acquire) {
            return true;
        }
        match &mut *writer {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        false
    }
}

impl Controls for SocketControls {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let fd = self.fd.upgrade().ok_or_else(closed)?;
        let system_how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        match rustix::net::shutdown(&*fd, system_how) {
            // The peer has ended it already.
            Ok(()) | Err(Errno::NOTCONN) => {}
            Err(errno) => return Err(errno.into()),
        }
        if how.reads() {
            self.is_read_ended.store(true, Ordering::Release);
        }
        if how.writes() {
            let writer = {
                let mut writer = self.writer.lock();
                self.is_write_ended.store(true, Ordering::Release);
                writer.take()
            };
            if let Some(writer) = writer {
                writer.wake();
            }
        }
        Ok(())
    }

    fn set_delay(&self, is_allowed: bool) {
        // A hint: a socket that does not take it works as well.
        if let (Kind::Tcp, Some(fd)) = (self.kind, self.fd.upgrade()) {
            let _ = sockopt::set_tcp_nodelay(&*fd, !is_allowed);
        }
    }

    fn set_cork(&self, is_on: bool) {
        if let (Kind::Tcp, Some(fd)) = (self.kind, self.fd.upgrade()) {
            let _ = sockopt::set_tcp_cork(&*fd, is_on);
        }
    }
}
