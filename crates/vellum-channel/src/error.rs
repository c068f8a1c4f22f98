//! What can go wrong on a channel, told apart by kind.
//!
//! Channels speak `std::io::Error`, as every Tokio stream does. What this crate itself finds is an [`Error`] inside it:
//! [`kind_of`] gets its kind back.

use std::fmt;
use std::io;

/// What went wrong. [`ErrorKind::code`] is stable and meant for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// This kind of channel cannot do that; [`Features`](crate::Features) tells beforehand.
    Unsupported,
    /// An argument that no channel accepts.
    Invalid,
    /// The channel has been closed on this side.
    Closed,
    /// The channel is attached to no executor.
    Detached,
    /// The stream ended before all data were read.
    UnexpectedEof,
    /// More descriptors than one message or the receiver takes.
    TooManyDescriptors,
    /// The descriptor is of another type than the channel needs.
    WrongDescriptor,
    /// The kernel does not let this process lock memory enough for a zero-copy send.
    ZeroCopyMemory,
    /// An address that cannot be read as text.
    AddressSyntax,
    /// A host name has no address.
    Resolve,
    /// No address of the peer could be connected to.
    Connect,
    /// No address could be listened on.
    Listen,
    /// The time allowed has passed.
    Timeout,
    /// A limit on what a peer may send or ask for.
    Limit,
    /// The peer was turned away by this side's own rule.
    Refused,
    /// A child process could not be started, or ended badly.
    Command,

    /// The peer speaks something that is not TLS.
    TlsNotTls,
    /// No TLS version, cipher or group in common.
    TlsNoCommonParameters,
    /// The peer's certificate has expired.
    TlsCertificateExpired,
    /// The peer's certificate is not valid yet.
    TlsCertificateNotYetValid,
    /// The peer's certificate is for another name.
    TlsCertificateWrongName,
    /// The peer's certificate may not be used for this.
    TlsCertificateWrongUsage,
    /// The peer's certificate comes from an issuer that is not trusted.
    TlsCertificateUnknownIssuer,
    /// The peer's certificate has been revoked.
    TlsCertificateRevoked,
    /// The peer's certificate or chain cannot be read or does not verify.
    TlsCertificateBad,
    /// The peer gave no certificate though one is required.
    TlsCertificateMissing,
    /// The peer's certificate is good, but not on the list of those allowed.
    TlsCertificateNotAllowed,
    /// No application protocol (ALPN) in common.
    TlsNoCommonProtocol,
    /// The peer refused the handshake or broke off with an alert.
    TlsAlert,
    /// The peer broke the protocol.
    TlsProtocol,
    /// The stream ended without the peer's `close_notify`: it may have been cut.
    TlsTruncated,
    /// The credentials of this side cannot be used.
    TlsCredentials,

    /// The other side's opening handshake is not one of WebSocket.
    WebSocketHandshake,
    /// The peer broke the protocol.
    WebSocketProtocol,
    /// The peer closed the WebSocket while data were expected or being sent.
    WebSocketClosed,
}

impl ErrorKind {
    /// A stable name for programs and logs, e.g. `TLS_CERTIFICATE_EXPIRED`.
    pub fn code(self) -> &'static str {
        match self {
            Self::Unsupported => "CHANNEL_UNSUPPORTED",
            Self::Invalid => "CHANNEL_INVALID",
            Self::Closed => "CHANNEL_CLOSED",
            Self::Detached => "CHANNEL_DETACHED",
            Self::UnexpectedEof => "CHANNEL_UNEXPECTED_EOF",
            Self::TooManyDescriptors => "CHANNEL_TOO_MANY_DESCRIPTORS",
            Self::WrongDescriptor => "CHANNEL_WRONG_DESCRIPTOR",
            Self::ZeroCopyMemory => "CHANNEL_ZERO_COPY_MEMORY",
            Self::AddressSyntax => "ADDRESS_SYNTAX",
            Self::Resolve => "ADDRESS_RESOLVE",
            Self::Connect => "CHANNEL_CONNECT",
            Self::Listen => "CHANNEL_LISTEN",
            Self::Timeout => "CHANNEL_TIMEOUT",
            Self::Limit => "CHANNEL_LIMIT",
            Self::Refused => "CHANNEL_REFUSED",
            Self::Command => "CHANNEL_COMMAND",
            Self::TlsNotTls => "TLS_NOT_TLS",
            Self::TlsNoCommonParameters => "TLS_NO_COMMON_PARAMETERS",
            Self::TlsCertificateExpired => "TLS_CERTIFICATE_EXPIRED",
            Self::TlsCertificateNotYetValid => "TLS_CERTIFICATE_NOT_YET_VALID",
            Self::TlsCertificateWrongName => "TLS_CERTIFICATE_WRONG_NAME",
            Self::TlsCertificateWrongUsage => "TLS_CERTIFICATE_WRONG_USAGE",
            Self::TlsCertificateUnknownIssuer => "TLS_CERTIFICATE_UNKNOWN_ISSUER",
            Self::TlsCertificateRevoked => "TLS_CERTIFICATE_REVOKED",
            Self::TlsCertificateBad => "TLS_CERTIFICATE_BAD",
            Self::TlsCertificateMissing => "TLS_CERTIFICATE_MISSING",
            Self::TlsCertificateNotAllowed => "TLS_CERTIFICATE_NOT_ALLOWED",
            Self::TlsNoCommonProtocol => "TLS_NO_COMMON_PROTOCOL",
            Self::TlsAlert => "TLS_ALERT",
            Self::TlsProtocol => "TLS_PROTOCOL",
            Self::TlsTruncated => "TLS_TRUNCATED",
            Self::TlsCredentials => "TLS_CREDENTIALS",
            Self::WebSocketHandshake => "WEBSOCKET_HANDSHAKE",
            Self::WebSocketProtocol => "WEBSOCKET_PROTOCOL",
            Self::WebSocketClosed => "WEBSOCKET_CLOSED",
        }
    }

    /// The nearest kind of `std::io`.
    pub fn io_kind(self) -> io::ErrorKind {
        match self {
            Self::Unsupported => io::ErrorKind::Unsupported,
            Self::Closed | Self::Detached => io::ErrorKind::NotConnected,
            Self::UnexpectedEof | Self::TlsTruncated => io::ErrorKind::UnexpectedEof,
            Self::Invalid | Self::AddressSyntax | Self::WrongDescriptor | Self::TooManyDescriptors => {
                io::ErrorKind::InvalidInput
            }
            Self::ZeroCopyMemory => io::ErrorKind::OutOfMemory,
            Self::Resolve => io::ErrorKind::NotFound,
            Self::Connect => io::ErrorKind::ConnectionRefused,
            Self::Listen => io::ErrorKind::AddrNotAvailable,
            Self::Timeout => io::ErrorKind::TimedOut,
            Self::Refused => io::ErrorKind::PermissionDenied,
            Self::WebSocketClosed => io::ErrorKind::ConnectionAborted,
            Self::Command | Self::TlsCredentials => io::ErrorKind::Other,
            _ => io::ErrorKind::InvalidData,
        }
    }
}

/// An error that this crate found itself, as it travels inside `std::io::Error`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with what happened, and what to do next, in words.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The same, caused by another error.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind.io_kind(), error)
    }
}

/// Shorthand: an `io::Error` of the given kind.
pub fn error(kind: ErrorKind, message: impl Into<String>) -> io::Error {
    Error::new(kind, message).into()
}

/// The kind of an error that this crate found; `None` for those of the system.
pub fn kind_of(error: &io::Error) -> Option<ErrorKind> {
    find(error).map(Error::kind)
}

fn find(error: &io::Error) -> Option<&Error> {
    let inner = error.get_ref()?;
    match inner.downcast_ref::<Error>() {
        Some(found) => Some(found),
        // An `io::Error` wrapped in another, as TLS and WebSocket libraries do.
        None => inner.downcast_ref::<io::Error>().and_then(find),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_come_back_through_io_errors() {
        let plain = error(ErrorKind::TlsTruncated, "cut");
        assert_eq!(kind_of(&plain), Some(ErrorKind::TlsTruncated));
        assert_eq!(plain.kind(), io::ErrorKind::UnexpectedEof);
        let wrapped = io::Error::other(plain);
        assert_eq!(kind_of(&wrapped), Some(ErrorKind::TlsTruncated));
        assert_eq!(kind_of(&io::Error::from_raw_os_error(5)), None);
    }

    #[test]
    fn an_error_tells_its_cause() {
        let error = Error::new(ErrorKind::Connect, "cannot connect to a:1")
            .because(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert!(error.to_string().starts_with("cannot connect to a:1: "));
        assert!(std::error::Error::source(&error).is_some());
    }
}
