//! What both sides of the opening handshake do: read a head within bounds, look at its fields.

use super::receive::AHEAD;
use crate::channel::Channel;
use crate::error::{ErrorKind, error};
use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use sha1::{Digest, Sha1};
use std::io;
use tokio::io::AsyncReadExt;

/// The longest head of a request or an answer (case W01).
pub(super) const HEAD_MAX: usize = AHEAD;
/// The most header fields.
pub(super) const FIELDS_MAX: usize = 64;
/// What the key is combined with: RFC 6455, section 1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Characters of a text from the peer that go into a message.
const QUOTE_MAX: usize = 128;

/// Base64 that does not mind the unused bits of the last character.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical),
);

/// What was read until the head was complete, and what came behind it.
#[derive(Debug)]
pub(super) struct Input {
    pub bytes: Vec<u8>,
    pub head: usize,
    pub end: usize,
}

/// Why no head could be read.
#[derive(Debug)]
pub(super) enum HeadError {
    Io(io::Error),
    Ended { got: usize },
    TooLong,
    TooManyFields,
    Syntax(httparse::Error),
}

/// Reads until `parse` finds a complete head.
pub(super) async fn read_head<C: Channel>(
    channel: &mut C,
    parse: impl Fn(&[u8]) -> httparse::Result<usize>,
) -> Result<Input, HeadError> {
    let mut bytes = vec![0; HEAD_MAX];
    let mut end = 0;
    while end < HEAD_MAX {
        let read = channel.read(&mut bytes[end..]).await.map_err(HeadError::Io)?;
        if read == 0 {
            return Err(HeadError::Ended { got: end });
        }
        // A head is looked at when another line of it is there, and at its very start to turn away what is not HTTP:
        // a peer that sends it byte by byte makes no work that grows with the square of its length.
        let is_first = end == 0;
        let has_line = bytes[end..end + read].contains(&b'\n');
        end += read;
        if !is_first && !has_line {
            continue;
        }
        match parse(&bytes[..end]) {
            Ok(httparse::Status::Complete(head)) => return Ok(Input { bytes, head, end }),
            Ok(httparse::Status::Partial) => {}
            Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
            Err(error) => return Err(HeadError::Syntax(error)),
        }
    }
    Err(HeadError::TooLong)
}

impl HeadError {
    /// The error for the user; `whose` completes "the ... of ...": "request", "answer".
    pub fn into_io(self, label: &str, whose: &str) -> io::Error {
        let (kind, what) = match self {
            Self::Io(error) => return error,
            Self::Ended { got } => {
                (ErrorKind::UnexpectedEof, format!("ended after {got} bytes of the {whose}"))
            }
            Self::TooLong => (ErrorKind::Limit, format!("the {whose} is longer than {HEAD_MAX} bytes")),
            Self::TooManyFields => {
                (ErrorKind::Limit, format!("the {whose} has more than {FIELDS_MAX} header fields"))
            }
            Self::Syntax(error) => {
                (ErrorKind::WebSocketHandshake, format!("the {whose} is not HTTP/1.1 ({error})"))
            }
        };
        error(kind, format!("{label}: WebSocket handshake failed: {what}"))
    }
}

/// The header fields of a head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'h>(pub &'h [httparse::Header<'h>]);

impl<'h> Fields<'h> {
    fn all(self, name: &'static str) -> impl Iterator<Item = &'h [u8]> {
        self.0.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    }

    /// Whether there is such a field.
    pub fn has(self, name: &'static str) -> bool {
        self.all(name).next().is_some()
    }

    /// The value of a field that may be there once.
    pub fn one(self, name: &'static str) -> Result<Option<&'h str>, String> {
        let mut values = self.all(name);
        let first = values.next();
        if values.next().is_some() {
            return Err(format!("the header field {name} is there twice"));
        }
        first.map(|value| text(name, value)).transpose()
    }

    /// The values of a field that is a list, possibly in several lines.
    pub fn list(self, name: &'static str) -> Result<Vec<&'h str>, String> {
        let mut all = Vec::new();
        for value in self.all(name) {
            all.extend(text(name, value)?.split(',').map(str::trim).filter(|part| !part.is_empty()));
        }
        Ok(all)
    }

    /// Checks that both sides speak of switching to WebSocket.
    pub fn check_upgrade(self) -> Result<(), String> {
        for (name, token) in [("Upgrade", "websocket"), ("Connection", "upgrade")] {
            if !self.list(name)?.iter().any(|part| part.eq_ignore_ascii_case(token)) {
                return Err(format!("the header field {name} does not say {token}"));
            }
        }
        Ok(())
    }
}

fn text<'h>(name: &str, value: &'h [u8]) -> Result<&'h str, String> {
    let text = std::str::from_utf8(value).map_err(|_| format!("the header field {name} is not text"))?;
    Ok(text.trim())
}

/// A key of 16 random bytes.
pub(super) fn make_key() -> io::Result<String> {
    let mut key = [0; 16];
    getrandom::fill(&mut key).map_err(io::Error::other)?;
    Ok(BASE64.encode(key))
}

/// Whether this is the text of 16 bytes.
pub(super) fn is_key(key: &str) -> bool {
    key.len() == 24 && BASE64.decode(key).is_ok_and(|bytes| bytes.len() == 16)
}

/// What the server answers to a key.
pub(super) fn accept_key(key: &str) -> String {
    BASE64.encode(Sha1::new().chain_update(key).chain_update(GUID).finalize())
}

/// A text from the peer as it may stand in a message: escaped and cut.
pub(super) fn quote(text: &str) -> String {
    let mut quoted: String =
        text.chars().take(QUOTE_MAX).flat_map(char::escape_debug).take(QUOTE_MAX).collect();
    if text.chars().nth(QUOTE_MAX).is_some() {
        quoted.push_str("...");
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        // The example of RFC 6455, section 1.3.
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(is_key("dGhlIHNhbXBsZSBub25jZQ=="));
        for bad in ["", "dGhlIHNhbXBsZSBub25jZQ=", "dGhlIHNhbXBsZSBub25jZQAA", "dGhlIHNhbXBsZSBub25*ZQ=="] {
            assert!(!is_key(bad), "{bad} is no key");
        }
        let made = make_key().expect("a key");
        assert!(is_key(&made));
        assert_ne!(made, make_key().expect("another key"));
    }

    #[test]
    fn texts_of_the_peer_are_escaped_and_cut() {
        assert_eq!(quote("a\u{1b}[2J\n"), "a\\u{1b}[2J\\n");
        let long = quote(&"\u{7}".repeat(1000));
        assert!(long.len() <= QUOTE_MAX + 3 && long.ends_with("..."), "{long}");
    }

    #[test]
    fn lists_may_be_in_several_lines() {
        let field = |name, value| httparse::Header { name, value };
        let all = [field("Connection", &b"keep-alive, Upgrade"[..]), field("UPGRADE", b"WebSocket")];
        Fields(&all).check_upgrade().expect("both are there");
        let split =
            [field("connection", &b"x"[..]), field("connection", b"upgrade"), field("upgrade", b"websocket")];
        Fields(&split).check_upgrade().expect("both are there");
        let part = [field("Connection", &b"upgraded"[..]), field("Upgrade", b"websocket")];
        Fields(&part).check_upgrade().expect_err("a token that only begins so");
        Fields(&split).one("connection").expect_err("twice");
        Fields(&[field("Host", &[0xFF, 0xFE][..])]).one("Host").expect_err("not text");
    }
}
