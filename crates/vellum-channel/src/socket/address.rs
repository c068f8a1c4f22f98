//! Endpoints as the kernel has them.

use crate::endpoint::Endpoint;
use crate::error::{ErrorKind, error};
use socket2::{SockAddr, SockRef};
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bytes of a Unix socket's path or abstract name that an address has room for (`sun_path`, less the NUL that ends a
/// path or begins a name).
const UNIX_NAME_MAX: usize = 107;

/// The kernel's form of an address to connect to or to listen on.
pub(super) fn to_system(endpoint: &Endpoint) -> io::Result<SockAddr> {
    match endpoint {
        Endpoint::Ip(address) => Ok(SockAddr::from(*address)),
        Endpoint::UnixPath(path) => {
            check_path(path)?;
            SockAddr::unix(path)
        }
        Endpoint::UnixAbstract(name) => {
            if name.is_empty() || name.len() > UNIX_NAME_MAX {
                return Err(invalid(format!(
                    "an abstract name has 1 to {UNIX_NAME_MAX} bytes, this one has {}",
                    name.len()
                )));
            }
            SockAddr::unix(OsStr::from_bytes(&[&[0], name.as_slice()].concat()))
        }
        Endpoint::UnixUnnamed => Err(invalid("a Unix socket needs a path or an abstract name".to_owned())),
        Endpoint::Vsock { cid, port } => Ok(SockAddr::vsock(*cid, *port)),
    }
}

fn check_path(path: &Path) -> io::Result<()> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(invalid("the path of the Unix socket is empty".to_owned()));
    }
    if bytes.contains(&0) {
        return Err(invalid(format!("the path of a Unix socket has no NUL bytes, but {path:?} has")));
    }
    if bytes.len() > UNIX_NAME_MAX {
        return Err(invalid(format!(
            "the path of a Unix socket has at most {UNIX_NAME_MAX} bytes, but {path:?} has {}: choose a shorter one, or \
             one relative to the working directory",
            bytes.len()
        )));
    }
    Ok(())
}

fn invalid(message: String) -> io::Error {
    error(ErrorKind::Invalid, message)
}

/// The address of this end.
pub(super) fn local(fd: BorrowedFd<'_>) -> io::Result<Endpoint> {
    from_system(&SockRef::from(&fd).local_addr()?)
}

/// The address of the other end.
pub(super) fn peer(fd: BorrowedFd<'_>) -> io::Result<Endpoint> {
    from_system(&SockRef::from(&fd).peer_addr()?)
}

fn from_system(address: &SockAddr) -> io::Result<Endpoint> {
    if let Some(ip) = address.as_socket() {
        return Ok(Endpoint::Ip(ip));
    }
    if let Some((cid, port)) = address.as_vsock_address() {
        return Ok(Endpoint::Vsock { cid, port });
    }
    if let Some(path) = address.as_pathname() {
        return Ok(Endpoint::UnixPath(path.to_owned()));
    }
    if let Some(name) = address.as_abstract_namespace() {
        return Ok(Endpoint::UnixAbstract(name.to_owned()));
    }
    if address.is_unix() {
        return Ok(Endpoint::UnixUnnamed);
    }
    Err(error(
        ErrorKind::Unsupported,
        format!("the socket has an address of family {}, which has no text form here", address.family()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::kind_of;
    use std::path::PathBuf;

    #[test]
    fn addresses_come_back_from_the_kernels_form() {
        for endpoint in [
            Endpoint::Ip("127.0.0.1:80".parse().expect("an address")),
            Endpoint::Ip("[::1]:65535".parse().expect("an address")),
            Endpoint::UnixPath(PathBuf::from("/tmp/a socket")),
            Endpoint::UnixPath(PathBuf::from("p".repeat(UNIX_NAME_MAX))),
            Endpoint::UnixAbstract(b"name\0with nul".to_vec()),
            Endpoint::UnixAbstract(vec![b'n'; UNIX_NAME_MAX]),
            Endpoint::Vsock { cid: 2, port: 1024 },
        ] {
            let system = to_system(&endpoint).expect("a good address");
            assert_eq!(from_system(&system).expect("a known family"), endpoint);
        }
    }

    #[test]
    fn names_that_no_address_has_room_for_are_refused() {
        for endpoint in [
            Endpoint::UnixPath(PathBuf::new()),
            Endpoint::UnixPath(PathBuf::from("a\0b")),
            Endpoint::UnixPath(PathBuf::from("p".repeat(UNIX_NAME_MAX + 1))),
            Endpoint::UnixAbstract(Vec::new()),
            Endpoint::UnixAbstract(vec![b'n'; UNIX_NAME_MAX + 1]),
            Endpoint::UnixUnnamed,
        ] {
            let refused = to_system(&endpoint).expect_err("no such address");
            assert_eq!(kind_of(&refused), Some(ErrorKind::Invalid), "{endpoint:?}: {refused}");
        }
    }
}
