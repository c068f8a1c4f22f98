//! Printing addresses, so that they read back as the same.

use super::{Address, Families, FileMode, KeepAlivePart, Place, SocketPart, TlsPart, WebSocketPart};
use crate::endpoint::PrintCid;
use crate::tls::{ClientCertificates, TlsVersions};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use std::ffi::OsStr;
use std::fmt::{self, Display, Formatter};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

/// What is written as `%XX` in paths and names. Not `/`; but `@`, which begins an abstract name.
pub(crate) const PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/')
    .remove(b':')
    .remove(b'+')
    .remove(b',')
    .remove(b'=');

/// In values of options.
const VALUE: &AsciiSet = &PATH.remove(b'@').add(b'=').remove(b'[').remove(b']');

/// A path after `scheme:`, as `///absolute` or `relative`.
pub(crate) struct PrintPath<'a>(pub &'a Path);

impl Display for PrintPath<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.0.as_os_str().as_bytes().starts_with(b"/") {
            f.write_str("//")?;
        }
        percent_encode(self.0.as_os_str().as_bytes(), PATH).fmt(f)
    }
}

impl Display for Address {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.write_scheme(f)?;
        self.write_place(f)?;
        let has_path = matches!(self.place, Place::Tcp { .. } | Place::Vsock { .. });
        if let Some(web_socket) = self.web_socket.as_ref().filter(|_| has_path) {
            f.write_str(&web_socket.path)?;
        }
        let mut options = Options { f, count: 0 };
        options.place(&self.place)?;
        let is_socket = match &self.place {
            Place::Tcp { .. } | Place::UnixPath { .. } | Place::UnixAbstract { .. } => true,
            Place::Vsock { .. } | Place::Fd { .. } => true,
            Place::Exec { .. } | Place::File { .. } | Place::Stdio | Place::Null => false,
        };
        if !is_socket {
            return Ok(());
        }
        let may_be_tcp = matches!(self.place, Place::Tcp { .. } | Place::Fd { .. });
        options.socket(&self.socket, may_be_tcp)?;
        if self.tls.is_some() || self.web_socket.is_some() {
            options.time("handshake-timeout", self.socket.handshake_timeout)?;
        }
        if let Some(tls) = &self.tls {
            options.tls(tls)?;
        }
        if let Some(web_socket) = &self.web_socket {
            options.web_socket(web_socket, !has_path)?;
        }
        Ok(())
    }
}

impl Address {
    fn write_scheme(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let base = match &self.place {
            Place::Tcp { .. } => "tcp",
            Place::UnixPath { .. } | Place::UnixAbstract { .. } => "unix",
            Place::Vsock { .. } => "vsock",
            Place::Exec { .. } => "exec",
            Place::Fd { .. } => "fd",
            Place::File { .. } => "file",
            Place::Stdio => "stdio",
            Place::Null => "null",
        };
        match (self.tls.is_some(), self.web_socket.is_some(), base) {
            (false, true, "tcp") => f.write_str("ws:"),
            (true, true, "tcp") => f.write_str("wss:"),
            (false, false, base) => write!(f, "{base}:"),
            (true, false, base) => write!(f, "tls+{base}:"),
            (false, true, base) => write!(f, "ws+{base}:"),
            (true, true, base) => write!(f, "wss+{base}:"),
        }
    }

    fn write_place(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Tcp { host, port, .. } => match host.split_once('%') {
                Some((host, zone)) => write!(f, "//[{host}%25{zone}]:{port}"),
                None if host.contains(':') => write!(f, "//[{host}]:{port}"),
                None => write!(f, "//{host}:{port}"),
            },
            Place::UnixPath { path, .. } | Place::File { path, .. } => PrintPath(path).fmt(f),
            Place::UnixAbstract { name } => write!(f, "@{}", percent_encode(name, PATH)),
            Place::Vsock { cid, port } => write!(f, "//{}:{port}", PrintCid(*cid)),
            Place::Exec { command } => f.write_str(command),
            Place::Fd { number } => number.fmt(f),
            Place::Stdio | Place::Null => Ok(()),
        }
    }
}

struct Options<'a, 'b> {
    f: &'a mut Formatter<'b>,
    count: usize,
}

impl Options<'_, '_> {
    fn add(&mut self, name: &str, value: impl Display) -> fmt::Result {
        self.f.write_str(if self.count == 0 { "?" } else { "&" })?;
        self.count += 1;
        write!(self.f, "{name}={value}")
    }

    fn number(&mut self, name: &str, value: Option<u32>) -> fmt::Result {
        value.map_or(Ok(()), |value| self.add(name, value))
    }

    fn flag(&mut self, name: &str, value: Option<bool>) -> fmt::Result {
        value.map_or(Ok(()), |is_on| self.add(name, if is_on { "on" } else { "off" }))
    }

    fn time(&mut self, name: &str, value: Option<Duration>) -> fmt::Result {
        match value {
            None => Ok(()),
            Some(time) if time.subsec_millis() == 0 => self.add(name, format_args!("{}s", time.as_secs())),
            Some(time) => self.add(name, format_args!("{}ms", time.as_millis())),
        }
    }

    fn value(&mut self, name: &str, value: Option<impl AsRef<OsStr>>) -> fmt::Result {
        let Some(value) = value else { return Ok(()) };
        self.add(name, percent_encode(value.as_ref().as_bytes(), VALUE))
    }

    fn values(&mut self, name: &str, values: &[impl AsRef<OsStr>]) -> fmt::Result {
        values.iter().try_for_each(|value| self.value(name, Some(value)))
    }

    fn place(&mut self, place: &Place) -> fmt::Result {
        match place {
            Place::Tcp { to, families, .. } => {
                match families {
                    Families::Any => {}
                    Families::Ipv4 => self.add("ipv4", "on")?,
                    Families::Ipv6 => self.add("ipv6", "on")?,
                }
                self.number("to", to.map(u32::from))
            }
            Place::UnixPath { mode, unlink, .. } => {
                if let Some(mode) = mode {
                    self.add("mode", format_args!("{mode:o}"))?;
                }
                self.flag("unlink", *unlink)
            }
            Place::File { mode, .. } => match mode {
                FileMode::Read => Ok(()),
                FileMode::Write => self.add("mode", "write"),
                FileMode::ReadWrite => self.add("mode", "read-write"),
                FileMode::Append => self.add("mode", "append"),
            },
            _ => Ok(()),
        }
    }

    fn socket(&mut self, socket: &SocketPart, may_be_tcp: bool) -> fmt::Result {
        self.time("timeout", socket.timeout)?;
        self.number("sndbuf", socket.send_buffer)?;
        self.number("rcvbuf", socket.receive_buffer)?;
        self.number("backlog", socket.backlog)?;
        if !may_be_tcp {
            return Ok(());
        }
        self.flag("nodelay", socket.no_delay)?;
        self.time("user-timeout", socket.user_timeout)?;
        match &socket.keep_alive {
            None => Ok(()),
            Some(KeepAlivePart::Off) => self.add("keepalive", "off"),
            Some(KeepAlivePart::On(times)) => {
                self.add("keepalive", "on")?;
                self.time("keepalive-idle", times.idle)?;
                self.time("keepalive-interval", times.interval)?;
                self.number("keepalive-count", times.count)
            }
        }
    }

    fn tls(&mut self, tls: &TlsPart) -> fmt::Result {
        self.value("ca", tls.ca.as_ref())?;
        self.value("cert", tls.certificate.as_ref())?;
        self.value("key", tls.key.as_ref())?;
        self.values("crl", &tls.crls)?;
        self.value("sni", tls.server_name.as_ref())?;
        self.values("alpn", &tls.alpn)?;
        match tls.versions {
            None => {}
            Some(TlsVersions::Tls13) => self.add("tls", "1.3")?,
            Some(TlsVersions::Tls12AndLater) => self.add("tls", "1.2")?,
            Some(TlsVersions::Tls12) => self.add("tls", "only-1.2")?,
        }
        match tls.client_certificate {
            None => {}
            Some(ClientCertificates::Required) => self.add("client-cert", "required")?,
            Some(ClientCertificates::Optional) => self.add("client-cert", "optional")?,
            Some(ClientCertificates::None) => self.add("client-cert", "none")?,
        }
        self.values("allow", &tls.allowed_names)
    }

    fn web_socket(&mut self, web_socket: &WebSocketPart, with_path: bool) -> fmt::Result {
        if with_path && web_socket.path != "/" {
            self.value("path", Some(&web_socket.path))?;
        }
        self.value("query", web_socket.query.as_ref())?;
        self.value("host", web_socket.host.as_ref())?;
        self.values("protocol", &web_socket.protocols)
    }
}
