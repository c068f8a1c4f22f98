//! Sockets that the service manager opened (systemd's socket activation).

use crate::error::{Error, ErrorKind, error};
use crate::passed;
use crate::socket::SocketListener;
use rustix::net::{SocketType, sockopt};
use std::env;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

/// The first descriptor that is passed: systemd's `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;

/// More are not believed.
const ACTIVATED_MAX: u16 = 1024;

/// A descriptor that the service manager passed. Dropped, it is closed.
#[derive(Debug)]
pub struct Activated {
    name: String,
    number: RawFd,
    fd: OwnedFd,
}

impl Activated {
    /// Its name (`FileDescriptorName=` of the unit); empty if it has none.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor, whatever it is.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The listening socket that it is.
    ///
    /// # Errors
    /// [`ErrorKind::WrongDescriptor`] if it is anything else: a file, a datagram socket, a connection (`Accept=yes`).
    pub fn into_listener(self) -> io::Result<SocketListener> {
        if let Err(what) = check_listening(&self.fd) {
            let Self { name, number, .. } = self;
            return Err(error(
                ErrorKind::WrongDescriptor,
                format!(
                    "descriptor {number} (\"{}\"), passed by the service manager, is {what}: a listening stream socket \
                     is needed (ListenStream= and Accept=no in its unit)",
                    name.escape_debug()
                ),
            ));
        }
        SocketListener::from_fd(self.fd)
    }
}

/// Whether it is a stream socket that listens; if not, what it is.
fn check_listening(fd: &impl AsFd) -> Result<(), String> {
    let what = passed::type_of(fd).map_err(|error| error.to_string())?;
    if what != "socket" {
        return Err(format!("a {what}"));
    }
    match sockopt::socket_type(fd) {
        Ok(SocketType::STREAM) => {}
        Ok(SocketType::DGRAM) => return Err("a datagram socket".to_owned()),
        Ok(_) => return Err("a socket of another type".to_owned()),
        Err(errno) => return Err(errno.to_string()),
    }
    match sockopt::socket_acceptconn(fd) {
        Ok(true) => Ok(()),
        Ok(false) => Err("a socket that does not listen".to_owned()),
        Err(errno) => Err(errno.to_string()),
    }
}

/// Takes over the descriptors that the service manager passed to this process (`LISTEN_PID`, `LISTEN_FDS`,
/// `LISTEN_FDNAMES`); none if it passed none. They will not be passed on to programs that this one starts.
///
/// Call it once: a second call finds them taken.
///
/// # Errors
/// [`ErrorKind::WrongDescriptor`] when the variables promise descriptors that are not there, or cannot be read.
pub fn activated() -> io::Result<Vec<Activated>> {
    let variable = |name| env::var(name).ok();
    let names = names_of(
        std::process::id(),
        variable("LISTEN_PID").as_deref(),
        variable("LISTEN_FDS").as_deref(),
        variable("LISTEN_FDNAMES").as_deref(),
    )?;
    let take = |(name, number)| Ok(Activated { name, number, fd: passed::take(number)? });
    names.into_iter().zip(FIRST..).map(take).collect()
}

/// The names of the descriptors that are passed to process `pid`.
fn names_of(
    pid: u32,
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
    listen_fdnames: Option<&str>,
) -> Result<Vec<String>, Error> {
    let unreadable = |name: &str, value: &str| {
        let value: String = value.chars().take(40).collect();
        Error::new(
            ErrorKind::WrongDescriptor,
            format!("the environment variable {name} is \"{}\": a number is needed", value.escape_debug()),
        )
    };
    let (Some(listen_pid), Some(listen_fds)) = (listen_pid, listen_fds) else { return Ok(Vec::new()) };
    let meant = listen_pid.parse::<u32>().map_err(|_| unreadable("LISTEN_PID", listen_pid))?;
    if meant != pid {
        // They were for the process that started this one.
        return Ok(Vec::new());
    }
    let count = listen_fds.parse::<u16>().ok().filter(|count| *count <= ACTIVATED_MAX);
    let count = usize::from(count.ok_or_else(|| unreadable("LISTEN_FDS", listen_fds))?);
    let mut names: Vec<String> = match listen_fdnames {
        None | Some("") => Vec::new(),
        Some(names) => names.split(':').map(str::to_owned).collect(),
    };
    if names.len() > count {
        return Err(Error::new(
            ErrorKind::WrongDescriptor,
            format!("LISTEN_FDNAMES has {} names for the {count} descriptors of LISTEN_FDS", names.len()),
        ));
    }
    names.resize(count, String::new());
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    #[test]
    fn variables_are_for_this_process_only() {
        let none = Vec::<String>::new();
        assert_eq!(names_of(7, None, None, None).expect("nothing"), none);
        assert_eq!(names_of(7, Some("8"), Some("2"), None).expect("another's"), none);
        assert_eq!(names_of(7, Some("7"), Some("0"), None).expect("no descriptors"), none);
        assert_eq!(names_of(7, Some("7"), Some("2"), Some("a:b")).expect("two"), ["a", "b"]);
        assert_eq!(names_of(7, Some("7"), Some("2"), Some("a")).expect("two"), ["a", ""]);
        assert_eq!(names_of(7, Some("7"), Some("2"), None).expect("two"), ["", ""]);
        for (pid, fds, names) in [
            ("x", "1", None),
            ("7", "-1", None),
            ("7", "1025", None),
            ("7", "", None),
            ("7", "1", Some("a:b")),
        ] {
            let refused = names_of(7, Some(pid), Some(fds), names).expect_err("not readable");
            assert_eq!(refused.kind(), ErrorKind::WrongDescriptor, "{pid} {fds}");
        }
    }

    #[test]
    fn only_listening_stream_sockets_pass() {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("s")).expect("a listener");
        assert_eq!(check_listening(&listener), Ok(()));
        let (one, _other) = UnixStream::pair().expect("a pair");
        assert_eq!(check_listening(&one), Err("a socket that does not listen".to_owned()));
        let datagram = UnixDatagram::unbound().expect("a socket");
        assert_eq!(check_listening(&datagram), Err("a datagram socket".to_owned()));
        let file = tempfile::tempfile().expect("a file");
        assert_eq!(check_listening(&file), Err("a file".to_owned()));
    }
}
