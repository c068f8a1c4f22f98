//! How sockets are to behave.

use super::Kind;
use rustix::net::sockopt;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// How a socket is to behave. What its kind does not have (those of TCP on a Unix socket, say) is ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketOptions {
    /// Send small writes at once (`TCP_NODELAY`).
    pub no_delay: bool,
    /// Ask a silent peer whether it is still there (`SO_KEEPALIVE`); `None`: never.
    pub keep_alive: Option<KeepAlive>,
    /// Bytes of the kernel's send buffer (`SO_SNDBUF`, which the kernel doubles and limits); `None`: its own choice, which
    /// grows with the need.
    pub send_buffer: Option<usize>,
    /// Bytes of the kernel's receive buffer (`SO_RCVBUF`, as above).
    pub receive_buffer: Option<usize>,
    /// How long sent data may stay without an answer before the connection is given up (`TCP_USER_TIMEOUT`); `None`: the
    /// system's choice, many minutes.
    pub user_timeout: Option<Duration>,
    /// Offer [`Features::ZERO_COPY`](crate::Features::ZERO_COPY), if the socket is of TCP and the kernel has it. It costs
    /// one more descriptor, and pays for large writes over a real network only.
    pub zero_copy: bool,
}

/// When to ask a silent peer whether it is still there. What is `None` is the system's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KeepAlive {
    /// Silence before the first question (whole seconds, at least one).
    pub idle: Option<Duration>,
    /// Time between questions (whole seconds, at least one).
    pub interval: Option<Duration>,
    /// Questions without an answer after which the connection is given up.
    pub count: Option<u32>,
}

impl SocketOptions {
    /// Sets all but zero-copy, which needs the channel.
    pub(super) fn set_on(&self, fd: BorrowedFd<'_>, kind: Kind) -> io::Result<()> {
        if let Some(bytes) = self.send_buffer {
            sockopt::set_socket_send_buffer_size(fd, bytes)?;
        }
        if let Some(bytes) = self.receive_buffer {
            sockopt::set_socket_recv_buffer_size(fd, bytes)?;
        }
        if kind != Kind::Tcp {
            return Ok(());
        }
        if self.no_delay {
            sockopt::set_tcp_nodelay(fd, true)?;
        }
        if let Some(timeout) = self.user_timeout {
            let millis = u32::try_from(timeout.as_millis()).unwrap_or(i32::MAX.unsigned_abs());
            sockopt::set_tcp_user_timeout(fd, millis.min(i32::MAX.unsigned_abs()))?;
        }
        match self.keep_alive {
            Some(keep_alive) => keep_alive.set_on(fd),
            None => Ok(()),
        }
    }
}

impl KeepAlive {
    fn set_on(self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sockopt::set_socket_keepalive(fd, true)?;
        if let Some(idle) = self.idle {
            sockopt::set_tcp_keepidle(fd, whole_seconds(idle))?;
        }
        if let Some(interval) = self.interval {
            sockopt::set_tcp_keepintvl(fd, whole_seconds(interval))?;
        }
        if let Some(count) = self.count {
            sockopt::set_tcp_keepcnt(fd, count)?;
        }
        Ok(())
    }
}

/// The kernel takes whole seconds only: rounded up, so that it never asks earlier than told.
fn whole_seconds(time: Duration) -> Duration {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    Duration::from_secs(seconds.max(1))
}

/// How a listening socket is to behave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// Connections that may wait to be accepted; the kernel has a limit of its own (`net.core.somaxconn`).
    pub backlog: u32,
    /// Permissions of a Unix socket's path, whatever the umask; nobody can connect before they are set. `None`: those that
    /// the umask leaves.
    pub unix_mode: Option<u32>,
    /// Replace an existing Unix socket on which nobody answers. A path that is something else, or on which somebody
    /// answers, always stays.
    pub unlink_existing: bool,
    /// Leave IPv4 alone when listening on an IPv6 address (`IPV6_V6ONLY`).
    pub ipv6_only: bool,
    /// How accepted sockets are to behave.
    pub socket: SocketOptions,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            backlog: 128,
            unix_mode: None,
            unlink_existing: true,
            ipv6_only: false,
            socket: SocketOptions::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rounded_up_to_whole_seconds() {
        for (given, set) in [(0, 1), (1, 1), (999, 1), (1000, 1), (1001, 2), (30_000, 30)] {
            assert_eq!(whole_seconds(Duration::from_millis(given)), Duration::from_secs(set), "{given} ms");
        }
    }
}
