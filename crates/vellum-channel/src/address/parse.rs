//! Reading addresses.

use super::options::{Options, path_of};
use super::part::Part;
use super::{
    ADDRESS_MAX, Address, Families, FileMode, KeepAlivePart, Place, SocketPart, TlsPart, WebSocketPart,
};
use crate::error::{Error, ErrorKind};
use crate::socket::KeepAlive;
use crate::tls::{ClientCertificates, TlsVersions};
use std::net::Ipv6Addr;
use std::str::FromStr;

/// The longest path or abstract name of a Unix socket: the kernel's `sun_path` less a zero byte.
const UNIX_NAME_MAX: usize = 107;
/// The longest host name of DNS.
const HOST_MAX: usize = 255;

/// What can stand below TLS and WebSocket, and alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Base {
    Tcp,
    Unix,
    Vsock,
    Exec,
    Fd,
    File,
    Stdio,
    Null,
}

#[derive(Clone, Copy)]
struct Scheme {
    base: Base,
    tls: bool,
    web_socket: bool,
}

const SCHEMES: &str =
    "tcp, unix, vsock, fd (each also after tls+, ws+ or wss+), ws, wss, exec, file, stdio or null";

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > ADDRESS_MAX {
            return Err(Error::new(
                ErrorKind::AddressSyntax,
                format!("an address of {} bytes is too long: up to {ADDRESS_MAX} are read", text.len()),
            ));
        }
        let whole = Part::whole(text);
        if whole.is_empty() {
            return Err(whole.fail("an address such as tcp://host:port or unix:///path"));
        }
        if text == "-" {
            return Ok(Self::new(Place::Stdio));
        }
        if let Some((scheme, rest)) = whole.split_once(':') {
            if let Some(scheme) = scheme_of(scheme.text()) {
                return read(scheme, rest);
            }
            if rest.text().starts_with("//") || scheme.text().contains('+') {
                return Err(whole.fail(format_args!("one of the schemes {SCHEMES}")));
            }
        }
        if text.starts_with(['/', '.']) {
            return Err(whole.fail("file: or unix: before a path"));
        }
        read(Scheme { base: Base::Tcp, tls: false, web_socket: false }, whole)
    }
}

fn scheme_of(text: &str) -> Option<Scheme> {
    let scheme = |base, tls, web_socket| Some(Scheme { base, tls, web_socket });
    match text {
        "ws" => return scheme(Base::Tcp, false, true),
        "wss" => return scheme(Base::Tcp, true, true),
        _ => {}
    }
    let (tls, web_socket, base) = match text.split_once('+') {
        None => (false, false, text),
        Some(("tls", base)) => (true, false, base),
        Some(("ws", base)) => (false, true, base),
        Some(("wss", base)) => (true, true, base),
        Some(_) => return None,
    };
    let base = match base {
        "tcp" => Base::Tcp,
        "unix" => Base::Unix,
        "vsock" => Base::Vsock,
        "fd" => Base::Fd,
        // Nothing stands on top of these.
        _ if tls || web_socket => return None,
        "exec" => Base::Exec,
        "file" => Base::File,
        "stdio" => Base::Stdio,
        "null" => Base::Null,
        _ => return None,
    };
    scheme(base, tls, web_socket)
}

/// Reads what follows the scheme.
fn read(scheme: Scheme, rest: Part<'_>) -> Result<Address, Error> {
    if scheme.base == Base::Exec {
        return exec(rest);
    }
    let (mut place, rest) = match scheme.base {
        Base::Tcp => tcp(scheme, rest)?,
        Base::Unix => unix(rest)?,
        Base::Vsock => vsock(rest)?,
        Base::Fd => fd(rest)?,
        Base::File => file(rest)?,
        Base::Stdio => (Place::Stdio, rest),
        Base::Null | Base::Exec => (Place::Null, rest),
    };
    // Of WebSocket, where the text has room for a path of its own.
    let has_path = scheme.web_socket && matches!(scheme.base, Base::Tcp | Base::Vsock);
    let (path, rest) = if has_path { rest.until(&['?']) } else { rest.split_at(0) };
    let mut options = Options::read(rest, scheme.base == Base::Tcp && !scheme.web_socket)?;
    place_options(&mut place, &mut options)?;
    let mut socket = SocketPart::default();
    if matches!(scheme.base, Base::Tcp | Base::Unix | Base::Vsock | Base::Fd) {
        socket = socket_options(scheme, &mut options)?;
    }
    let tls = if scheme.tls { Some(tls_options(&mut options)?) } else { None };
    let web_socket = if scheme.web_socket {
        Some(web_socket_options(has_path.then_some(path), &mut options)?)
    } else {
        None
    };
    options.finish()?;
    Ok(Address { place, tls, web_socket, socket })
}

fn exec(command: Part<'_>) -> Result<Address, Error> {
    let text = command.text();
    if text.trim().is_empty() || text.contains('\0') {
        return Err(command.fail("a command for /bin/sh, without a zero byte"));
    }
    Ok(Address::new(Place::Exec { command: text.to_owned() }))
}

fn tcp(scheme: Scheme, rest: Part<'_>) -> Result<(Place, Part<'_>), Error> {
    let rest = rest.strip("//").unwrap_or(rest);
    let (host, rest) = host(rest)?;
    let (port, rest) = match (rest.strip(":"), scheme.web_socket) {
        (Some(rest), _) => {
            let (port, rest) = rest.until(&['/', '?', ',']);
            (port.number("a port (IPv6 addresses stand in [ ])", 0, 65535)?, rest)
        }
        (None, true) => (if scheme.tls { 443 } else { 80 }, rest),
        (None, false) => return Err(rest.fail("\":\" and a port")),
    };
    let port = u16::try_from(port).unwrap_or_default();
    Ok((Place::Tcp { host, port, to: None, families: Families::Any }, rest))
}

/// Reads a name or number, in brackets if it is one of IPv6.
fn host(rest: Part<'_>) -> Result<(String, Part<'_>), Error> {
    if let Some(inner) = rest.strip("[") {
        let Some((inside, after)) = inner.split_once(']') else {
            return Err(rest.fail("\"]\" after the IPv6 address"));
        };
        let (number, zone) = match inside.split_once('%') {
            // RFC 6874 writes the % as %25.
            Some((number, zone)) => (number, Some(zone.strip("25").unwrap_or(zone))),
            None => (inside, None),
        };
        if number.text().parse::<Ipv6Addr>().is_err() {
            return Err(number.fail("an IPv6 address"));
        }
        let Some(zone) = zone else { return Ok((number.text().to_owned(), after)) };
        if zone.is_empty() || zone.text().len() > HOST_MAX || !zone.text().chars().all(is_of_name) {
            return Err(zone.fail("the name or number of a network interface"));
        }
        return Ok((format!("{}%{}", number.text(), zone.text()), after));
    }
    let (name, after) = rest.until(&[':', '/', '?', ',']);
    if !name.text().is_ascii() {
        return Err(name.fail("a host name in ASCII (international names in their xn-- form)"));
    }
    if name.text().len() > HOST_MAX || !name.text().chars().all(is_of_name) {
        return Err(name.fail(format_args!("a host of up to {HOST_MAX} letters, digits, dots and hyphens")));
    }
    Ok((name.text().to_owned(), after))
}

fn is_of_name(one: char) -> bool {
    one.is_ascii_alphanumeric() || matches!(one, '.' | '-' | '_')
}

fn unix(rest: Part<'_>) -> Result<(Place, Part<'_>), Error> {
    let (name, options) = rest.until(&['?']);
    if let Some(name) = name.strip("@") {
        let bytes = name.decoded()?;
        if bytes.is_empty() || bytes.len() > UNIX_NAME_MAX {
            return Err(name.fail(format_args!("an abstract name of 1 to {UNIX_NAME_MAX} bytes")));
        }
        return Ok((Place::UnixAbstract { name: bytes }, options));
    }
    let path = path(name, "unix")?;
    let decoded = path_of(path)?;
    let length = decoded.as_os_str().len();
    if length == 0 || length > UNIX_NAME_MAX {
        return Err(path.fail(format_args!("a path of 1 to {UNIX_NAME_MAX} bytes, or @ and a name")));
    }
    Ok((Place::UnixPath { path: decoded, mode: None, unlink: None }, options))
}

/// The path of `scheme:path` and `scheme:///path`.
fn path<'a>(part: Part<'a>, scheme: &str) -> Result<Part<'a>, Error> {
    match part.strip("//") {
        Some(path) if path.text().starts_with('/') => Ok(path),
        Some(path) => Err(path.fail(format_args!("an absolute path (a relative one is {scheme}:path)"))),
        None => Ok(part),
    }
}

fn vsock(rest: Part<'_>) -> Result<(Place, Part<'_>), Error> {
    let rest = rest.strip("//").unwrap_or(rest);
    let Some((cid, rest)) = rest.split_once(':') else {
        return Err(rest.fail("a context identifier, \":\" and a port"));
    };
    let most = u64::from(u32::MAX);
    let cid = match cid.text() {
        "any" => most,
        "hypervisor" => 0,
        "local" => 1,
        "host" => 2,
        _ => cid.number("a context identifier (any, host, local)", 0, most)?,
    };
    let (port, rest) = rest.until(&['/', '?']);
    let port = port.number("a port", 0, most)?;
    let narrow = |number| u32::try_from(number).unwrap_or_default();
    Ok((Place::Vsock { cid: narrow(cid), port: narrow(port) }, rest))
}

fn fd(rest: Part<'_>) -> Result<(Place, Part<'_>), Error> {
    let (number, options) = rest.until(&['?']);
    let number = number.number("the number of a descriptor", 0, i32::MAX.unsigned_abs().into())?;
    Ok((Place::Fd { number: i32::try_from(number).unwrap_or_default() }, options))
}

fn file(rest: Part<'_>) -> Result<(Place, Part<'_>), Error> {
    let (name, options) = rest.until(&['?']);
    let path = path(name, "file")?;
    let decoded = path_of(path)?;
    if decoded.as_os_str().is_empty() {
        return Err(path.fail("a path"));
    }
    Ok((Place::File { path: decoded, mode: FileMode::Read }, options))
}

fn place_options(place: &mut Place, options: &mut Options<'_>) -> Result<(), Error> {
    match place {
        Place::Tcp { port, to, families, .. } => {
            *families = families_of(options)?;
            *to = options
                .number("to", u64::from(*port), 65535)?
                .map(|number| u16::try_from(number).unwrap_or_default());
        }
        Place::UnixPath { mode, unlink, .. } => {
            *mode = options.permissions("mode")?;
            *unlink = options.flag("unlink")?;
        }
        Place::File { mode, .. } => {
            if let Some(value) = options.raw("mode")? {
                *mode = match value.text() {
                    "read" => FileMode::Read,
                    "write" => FileMode::Write,
                    "read-write" => FileMode::ReadWrite,
                    "append" => FileMode::Append,
                    _ => return Err(value.fail("mode=read, write, read-write or append")),
                };
            }
        }
        _ => {}
    }
    Ok(())
}

fn families_of(options: &mut Options<'_>) -> Result<Families, Error> {
    let (ipv4, ipv6) = (options.placed_flag("ipv4")?, options.placed_flag("ipv6")?);
    let on = |given: Option<(bool, Part<'_>)>| given.map(|(is_on, _)| is_on);
    Ok(match (on(ipv4), on(ipv6)) {
        (None, None) | (Some(true), Some(true)) => Families::Any,
        (Some(true), _) | (None, Some(false)) => Families::Ipv4,
        (_, Some(true)) | (Some(false), None) => Families::Ipv6,
        (Some(false), Some(false)) => {
            let at = ipv6.map_or_else(|| Part::whole(""), |(_, at)| at);
            return Err(at.fail("one of ipv4 and ipv6 to be on"));
        }
    })
}

fn socket_options(scheme: Scheme, options: &mut Options<'_>) -> Result<SocketPart, Error> {
    const BUFFER_MAX: u32 = 1 << 30;
    let mut socket = SocketPart {
        timeout: options.time("timeout")?,
        send_buffer: options.count("sndbuf", 1, BUFFER_MAX)?,
        receive_buffer: options.count("rcvbuf", 1, BUFFER_MAX)?,
        backlog: options.count("backlog", 1, 65535)?,
        ..SocketPart::default()
    };
    // An inherited descriptor may be one of TCP.
    if matches!(scheme.base, Base::Tcp | Base::Fd) {
        socket.no_delay = options.flag("nodelay")?;
        socket.user_timeout = options.time("user-timeout")?;
        socket.keep_alive = keep_alive(options)?;
    }
    if scheme.tls || scheme.web_socket {
        socket.handshake_timeout = options.time("handshake-timeout")?;
    }
    Ok(socket)
}

fn keep_alive(options: &mut Options<'_>) -> Result<Option<KeepAlivePart>, Error> {
    let switch = options.placed_flag("keepalive")?;
    let idle = options.seconds("keepalive-idle")?;
    let interval = options.seconds("keepalive-interval")?;
    let count = options.count("keepalive-count", 1, 127)?;
    let has_times = idle.is_some() || interval.is_some() || count.is_some();
    match switch {
        Some((false, at)) if has_times => Err(at.fail("keepalive=on where its times are given")),
        Some((false, _)) => Ok(Some(KeepAlivePart::Off)),
        None if !has_times => Ok(None),
        _ => Ok(Some(KeepAlivePart::On(KeepAlive { idle, interval, count }))),
    }
}

fn tls_options(options: &mut Options<'_>) -> Result<TlsPart, Error> {
    Ok(TlsPart {
        ca: options.path("ca")?,
        certificate: options.path("cert")?,
        key: options.path("key")?,
        crls: options.paths("crl")?,
        server_name: options.text("sni")?,
        alpn: options.texts("alpn")?,
        versions: match options.raw("tls")? {
            None => None,
            Some(value) => Some(match value.text() {
                "1.3" => TlsVersions::Tls13,
                "1.2" => TlsVersions::Tls12AndLater,
                "only-1.2" => TlsVersions::Tls12,
                _ => return Err(value.fail("tls=1.3, tls=1.2 (and later) or tls=only-1.2")),
            }),
        },
        client_certificate: match options.raw("client-cert")? {
            None => None,
            Some(value) => Some(match value.text() {
                "required" => ClientCertificates::Required,
                "optional" => ClientCertificates::Optional,
                "none" => ClientCertificates::None,
                _ => return Err(value.fail("client-cert=required, optional or none")),
            }),
        },
        allowed_names: options.texts("allow")?,
    })
}

/// Reads the options of WebSocket, and the path: `path`, or the option of that name where the text has no room for it.
fn web_socket_options(path: Option<Part<'_>>, options: &mut Options<'_>) -> Result<WebSocketPart, Error> {
    const PATH: &str = "a path that begins with / and is of visible ASCII without ? and #";
    let is_path = |text: &str| text.starts_with('/') && is_sent(text, "?#");
    let path = match path {
        None => options.checked_text("path", is_path, PATH)?,
        Some(part) if part.is_empty() => None,
        Some(part) if is_path(part.text()) => Some(part.text().to_owned()),
        Some(part) => return Err(part.fail(PATH)),
    };
    Ok(WebSocketPart {
        path: path.unwrap_or_else(|| "/".to_owned()),
        query: options.checked_text(
            "query",
            |text| is_sent(text, "#"),
            "a query of visible ASCII without #",
        )?,
        host: options.checked_text(
            "host",
            |text| is_sent(text, "/?#@,"),
            "a host of visible ASCII, with a port if it has one",
        )?,
        protocols: options.checked_texts(
            "protocol",
            |text| is_sent(text, HTTP_SEPARATORS),
            "the name of a subprotocol: visible ASCII without HTTP's separators",
        )?,
    })
}

/// What a name in an HTTP header (a token) may not have.
const HTTP_SEPARATORS: &str = "()<>@,;:\\\"/[]?={}";

/// Whether `text` can be sent as it is: visible ASCII without those.
fn is_sent(text: &str, without: &str) -> bool {
    text.chars().all(|one| one.is_ascii_graphic() && !without.contains(one))
}
