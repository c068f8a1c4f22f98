//! What a WebSocket offers, accepts and allows.

use super::frame::CONTROL_MAX;
use crate::error::{ErrorKind, error};
use std::io;
use std::time::Duration;

/// Settings of a [`WebSocket`](crate::WebSocket), client and server.
///
/// ```
/// use vellum_channel::WebSocketOptions;
/// let options = WebSocketOptions { path: "/console/7".into(), ..WebSocketOptions::default() };
/// assert_eq!(options.protocols, ["binary"]);
/// ```
#[derive(Clone, Debug)]
pub struct WebSocketOptions {
    /// What the client asks for (with a query, if any), and what the server answers to (any query goes with it).
    pub path: String,
    /// The server answers to every path: [`WebSocket::path`](crate::WebSocket::path) tells which it was.
    pub any_path: bool,
    /// Subprotocols that the client offers and the server accepts, best first.
    pub protocols: Vec<String>,
    /// A peer that does not agree on a subprotocol is turned away.
    pub require_protocol: bool,
    /// Web pages that a browser may connect from, e.g. `https://example.org`; empty: all. Requests without an `Origin`
    /// header, which no browser makes, are always taken. For servers.
    pub origins: Vec<String>,
    /// More header fields for the client's request: `Authorization`, `Origin`, ...
    pub headers: Vec<(String, String)>,
    /// The longest message that is accepted, in bytes. Nothing of that size is ever held in memory.
    pub message_max: u64,
    /// The longest frame that is accepted.
    pub frame_max: u64,
    /// The longest message that is sent: larger writes are short, or become several messages.
    pub write_max: usize,
    /// How long the opening handshake may take.
    pub handshake_timeout: Duration,
    /// How long a close waits until all is sent and the peer has said goodbye, too; with zero it does not wait.
    pub close_timeout: Duration,
    /// Sends a ping when nothing was heard for this long while somebody reads, and fails when nothing is heard for as
    /// long again.
    pub keep_alive: Option<Duration>,
}

impl Default for WebSocketOptions {
    fn default() -> Self {
        Self {
            path: "/".into(),
            any_path: false,
            protocols: vec!["binary".into()],
            require_protocol: false,
            origins: Vec::new(),
            headers: Vec::new(),
            message_max: 33 << 20,
            frame_max: 33 << 20,
            write_max: 256 << 10,
            handshake_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(2),
            keep_alive: None,
        }
    }
}

impl WebSocketOptions {
    /// The longest message that is sent, within what makes sense.
    pub(super) fn write_len(&self) -> usize {
        self.write_max.clamp(CONTROL_MAX, 16 << 20)
    }

    /// That what goes into a request or an answer cannot be mistaken for another header field.
    pub(super) fn check(&self) -> io::Result<()> {
        check_path(&self.path)?;
        if let Some(bad) = self.protocols.iter().find(|name| !is_token(name)) {
            return Err(invalid(format!("the WebSocket subprotocol {bad:?} is not a name (RFC 9110 token)")));
        }
        for (name, value) in &self.headers {
            let is_text = value.bytes().all(|byte| byte == b'\t' || (byte >= b' ' && byte != 0x7F));
            if !is_token(name) || !is_text {
                return Err(invalid(format!(
                    "the header field {name:?} of a WebSocket request cannot be sent"
                )));
            }
        }
        Ok(())
    }
}

fn check_path(path: &str) -> io::Result<()> {
    if path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        return Ok(());
    }
    Err(invalid(format!(
        "the WebSocket path {path:?} must begin with / and have neither spaces nor a fragment: percent-encode them"
    )))
}

/// That a host can stand in a request.
pub(super) fn check_host(host: &str) -> io::Result<()> {
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+,;=".contains(&byte);
    if !host.is_empty() && host.bytes().all(is_host) {
        return Ok(());
    }
    Err(invalid(format!("{host:?} is not a host name for a WebSocket request: give name or name:port")))
}

fn invalid(message: String) -> io::Error {
    error(ErrorKind::Invalid, message)
}

/// Whether this is a token of RFC 9110, section 5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(is_part)
}
