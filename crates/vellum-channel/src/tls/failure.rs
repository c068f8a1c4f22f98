//! What rustls finds wrong, as errors for programs and people.

use super::certificate::{Certificate, day, shown};
use super::verify::Refused;
use crate::error::{ErrorKind, error};
use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerMisbehaved};
use std::io;

/// An end of a TLS channel that stays: every later operation tells the same.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    kind: ErrorKind,
    message: String,
}

impl Failure {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub fn to_error(&self) -> io::Error {
        error(self.kind, self.message.clone())
    }
}

/// The other end, for messages.
#[derive(Clone, Debug)]
pub(super) enum Peer {
    /// A server, by the name that was asked for.
    Server(String),
    Client,
}

impl Peer {
    /// `the server "host"`.
    pub fn whom(&self) -> String {
        match self {
            Self::Server(name) => format!("the server \"{}\"", shown(name)),
            Self::Client => "the client".to_owned(),
        }
    }
}

/// The first bytes that came from the peer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FirstBytes {
    bytes: [u8; 8],
    count: usize,
}

impl FirstBytes {
    /// Takes more of them, while they are the first.
    pub fn add(&mut self, more: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(self.count).zip(more) {
            *place = *byte;
            self.count += 1;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn seen(&self) -> &[u8] {
        &self.bytes[..self.count]
    }

    /// What the peer speaks, if it is not TLS: every TLS connection begins with a record of a handshake or alert, of
    /// version 3.x.
    fn other_protocol(&self) -> Option<String> {
        let seen = self.seen();
        let starts = |with: &[&str]| with.iter().any(|one| seen.starts_with(one.as_bytes()));
        match seen {
            [] | [0x15 | 0x16] | [0x15 | 0x16, 3, ..] => return None,
            _ => {}
        }
        let what = if starts(&["GET ", "HEAD ", "POST ", "PUT ", "OPTIONS ", "CONNECT ", "HTTP/"]) {
            "plain HTTP"
        } else if starts(&["SSH-"]) {
            "SSH"
        } else if starts(&["NBDMAGIC"]) {
            "plain NBD"
        } else if seen.len() > 2 && seen[0] & 0x80 != 0 && seen[2] == 1 {
            "SSL 2, which is broken and no longer spoken"
        } else {
            return Some(format!("something that begins with \"{}\"", seen.escape_ascii()));
        };
        Some(what.to_owned())
    }
}

/// Where and with whom something went wrong.
#[derive(Debug)]
pub(super) struct Scene<'a> {
    pub peer: &'a Peer,
    pub first: FirstBytes,
    pub is_handshaking: bool,
    pub refused: Option<Refused>,
}

impl Scene<'_> {
    /// What rustls found, in words.
    pub fn failure(&self, found: &Error) -> Failure {
        let whom = self.peer.whom();
        let is_foreign = matches!(
            found,
            Error::InvalidMessage(_) | Error::InappropriateMessage { .. } | Error::PeerSentOversizedRecord
        );
        if let (true, Some(other)) = (self.is_handshaking && is_foreign, self.first.other_protocol()) {
            let what = format!(
                "{whom} speaks {other}, not TLS: check its address and port, and whether it has TLS on"
            );
            return Failure::new(ErrorKind::TlsNotTls, what);
        }
        let (kind, what) = match found {
            Error::InvalidCertificate(why) => return self.bad_certificate(why),
            Error::InvalidCertRevocationList(why) => (
                ErrorKind::TlsCredentials,
                format!(
                    "the certificate of {whom} cannot be checked by the revocation list given here: {why:?}"
                ),
            ),
            Error::NoCertificatesPresented => (
                ErrorKind::TlsCertificateMissing,
                format!(
                    "{whom} gave no certificate, and one is required: give it one that a trusted issuer has signed"
                ),
            ),
            Error::AlertReceived(alert) => return alerted(&whom, *alert),
            Error::PeerIncompatible(why) => (
                ErrorKind::TlsNoCommonParameters,
                format!(
                    "no TLS version, cipher, group or signature in common with {whom} ({why:?}): allow TLS 1.2 here if \
                     it is old, or bring it up to date"
                ),
            ),
            Error::NoApplicationProtocol => (
                ErrorKind::TlsNoCommonProtocol,
                format!(
                    "no application protocol (ALPN) in common with {whom}: compare the lists of both sides"
                ),
            ),
            Error::InvalidMessage(
                InvalidMessage::HandshakePayloadTooLarge
                | InvalidMessage::CertificatePayloadTooLarge
                | InvalidMessage::MessageTooLarge,
            )
            | Error::PeerSentOversizedRecord => (
                ErrorKind::Limit,
                format!(
                    "{whom} sent a handshake message (a chain of certificates?) above 64 KiB or a record above 16 KiB"
                ),
            ),
            Error::PeerMisbehaved(
                why @ (PeerMisbehaved::TooManyKeyUpdateRequests
                | PeerMisbehaved::TooManyRenegotiationRequests
                | PeerMisbehaved::TooManyWarningAlertsReceived
                | PeerMisbehaved::TooManyEmptyFragments),
            ) => (ErrorKind::Limit, format!("{whom} keeps this side busy without sending data ({why:?})")),
            Error::DecryptError => (
                ErrorKind::TlsProtocol,
                format!(
                    "a record from {whom} does not decrypt: it was changed on the way, or the peer is broken"
                ),
            ),
            other => (ErrorKind::TlsProtocol, format!("{whom} broke the TLS protocol: {other}")),
        };
        Failure::new(kind, what)
    }

    fn bad_certificate(&self, found: &CertificateError) -> Failure {
        let whom = self.peer.whom();
        let read = self.refused.as_ref().and_then(|refused| refused.own.as_ref());
        let issuers = self.refused.as_ref().map(|refused| refused.issuers.as_slice()).unwrap_or_default();
        let own = read.map_or_else(String::new, |own| format!(" {}", own.describe()));
        let why = self.refused.as_ref().and_then(|refused| refused.why.as_deref()).unwrap_or_default();
        let (kind, what) = match found {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                let (which, when) = culprit(found, issuers, &own);
                (
                    ErrorKind::TlsCertificateExpired,
                    format!("{which} has expired{when}: renew it, or set the clock here"),
                )
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                let (which, when) = culprit(found, issuers, &own);
                (
                    ErrorKind::TlsCertificateNotYetValid,
                    format!("{which} is not valid yet{when}: set the clock here, or wait"),
                )
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                (ErrorKind::TlsCertificateWrongName, self.wrong_name(&own, read))
            }
            CertificateError::InvalidPurpose if !why.is_empty() => (
                ErrorKind::TlsCertificateWrongUsage,
                format!("the certificate{own} may not be used for this: {why}"),
            ),
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => (
                ErrorKind::TlsCertificateWrongUsage,
                format!("the certificate{own} may not be used for this: {found}"),
            ),
            CertificateError::UnknownIssuer => (
                ErrorKind::TlsCertificateUnknownIssuer,
                format!(
                    "the certificate{own} comes from an issuer that is not trusted here{}: trust that issuer (ca), or \
                     have the peer send the certificates between",
                    read.map(|own| format!(", \"{}\"", shown(&own.issuer))).unwrap_or_default()
                ),
            ),
            CertificateError::Revoked => (
                ErrorKind::TlsCertificateRevoked,
                format!("the certificate{own} has been revoked: do not trust it"),
            ),
            CertificateError::ExpiredRevocationList
            | CertificateError::ExpiredRevocationListContext { .. } => {
                let until = match found {
                    CertificateError::ExpiredRevocationListContext { next_update, .. } => {
                        format!(", valid until {},", day(seconds(*next_update)))
                    }
                    _ => String::new(),
                };
                let what = format!(
                    "the certificate{own} cannot be checked: the revocation list of its issuer{until} is out of date here: \
                     get the present one"
                );
                (ErrorKind::TlsCredentials, what)
            }
            CertificateError::ApplicationVerificationFailure => {
                (ErrorKind::TlsCertificateNotAllowed, format!("the certificate{own} is good, but {why}"))
            }
            other => (ErrorKind::TlsCertificateBad, format!("the certificate{own} does not verify: {other}")),
        };
        Failure::new(kind, format!("{whom} is refused: {what}"))
    }

    fn wrong_name(&self, own: &str, certificate: Option<&Certificate>) -> String {
        let expected = match self.peer {
            Peer::Server(name) => shown(name),
            Peer::Client => String::new(),
        };
        let has = certificate.map_or_else(String::new, Certificate::describe_names);
        format!(
            "the certificate{own} is for {has}, not for \"{expected}\": connect by one of its names, or set the name to \
             expect (sni)"
        )
    }
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

/// Which certificate of the chain is out of date, and since or until when.
fn culprit(found: &CertificateError, issuers: &[Certificate], own: &str) -> (String, String) {
    let (issuer, when) = match found {
        CertificateError::ExpiredContext { time, not_after } => (
            issuers.iter().find(|one| one.not_after == seconds(*not_after)),
            format!(" on {} (now {})", day(seconds(*not_after)), day(seconds(*time))),
        ),
        CertificateError::NotValidYetContext { time, not_before } => (
            issuers.iter().find(|one| one.not_before == seconds(*not_before)),
            format!(", but from {} (now {})", day(seconds(*not_before)), day(seconds(*time))),
        ),
        _ => (None, String::new()),
    };
    match issuer {
        Some(issuer) => {
            (format!("the certificate of the issuer {}, for that{own},", issuer.describe()), when)
        }
        None => (format!("the certificate{own}"), when),
    }
}

/// The peer broke off: its alert by the name of the standard, and what it means for this side.
fn alerted(whom: &str, alert: AlertDescription) -> Failure {
    use AlertDescription as A;
    let (name, advice) = match alert {
        A::UnexpectedMessage => ("unexpected_message", "one of both sides has a broken TLS"),
        A::BadRecordMac => {
            ("bad_record_mac", "what it got was changed on the way, or one of both sides is broken")
        }
        A::RecordOverflow => ("record_overflow", "one of both sides has a broken TLS"),
        A::HandshakeFailure => {
            ("handshake_failure", "nothing in common, or it requires a certificate: see its log")
        }
        A::BadCertificate => ("bad_certificate", "it does not accept this side's certificate: see its log"),
        A::UnsupportedCertificate => (
            "unsupported_certificate",
            "this side's certificate may not be used for this: look at its key usages",
        ),
        A::CertificateRevoked => {
            ("certificate_revoked", "this side's certificate has been revoked: get a new one")
        }
        A::CertificateExpired => {
            ("certificate_expired", "this side's certificate is out of date: renew it, or compare the clocks")
        }
        A::CertificateUnknown => {
            ("certificate_unknown", "it does not accept this side's certificate: see its log")
        }
        A::UnknownCA => (
            "unknown_ca",
            "it does not trust the issuer of this side's certificate: add that to its trusted issuers",
        ),
        A::AccessDenied => {
            ("access_denied", "this side's certificate is good, but not on its list of allowed names")
        }
        A::CertificateRequired => (
            "certificate_required",
            "it wants a certificate of this side: give one (identity; in an address cert and key)",
        ),
        A::DecodeError => {
            ("decode_error", "one of both sides has a broken TLS, or a message was above its limit")
        }
        A::DecryptError => {
            ("decrypt_error", "a signature does not verify: do certificate and key belong together?")
        }
        A::IllegalParameter => ("illegal_parameter", "one of both sides has a broken TLS"),
        A::ProtocolVersion => {
            ("protocol_version", "no version in common: allow TLS 1.2 on this side, or 1.3 on that")
        }
        A::InsufficientSecurity => ("insufficient_security", "it wants stronger ciphers"),
        A::InternalError => ("internal_error", "it has trouble of its own: see its log"),
        A::UserCanceled => ("user_canceled", "its user broke off"),
        A::MissingExtension => ("missing_extension", "one of both sides has a broken TLS"),
        A::UnrecognisedName => ("unrecognized_name", "it does not go by the name that was asked for"),
        A::NoApplicationProtocol => (
            "no_application_protocol",
            "no application protocol (ALPN) in common: compare the lists of both sides",
        ),
        _ => ("", "see its log"),
    };
    let kind = match alert {
        A::ProtocolVersion | A::InsufficientSecurity => ErrorKind::TlsNoCommonParameters,
        A::NoApplicationProtocol => ErrorKind::TlsNoCommonProtocol,
        _ => ErrorKind::TlsAlert,
    };
    let number = u8::from(alert);
    let name =
        if name.is_empty() { format!("alert {number}") } else { format!("the alert {name} ({number})") };
    Failure::new(kind, format!("{whom} broke off with {name}: {advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(bytes: &[u8]) -> FirstBytes {
        let mut first = FirstBytes::default();
        for part in bytes.chunks(3) {
            first.add(part);
        }
        first
    }

    #[test]
    fn other_protocols_are_known_by_their_first_bytes() {
        assert_eq!(first(b"GET / HTTP/1.1").other_protocol().as_deref(), Some("plain HTTP"));
        assert_eq!(first(b"HTTP/1.1 400").other_protocol().as_deref(), Some("plain HTTP"));
        assert_eq!(first(b"SSH-2.0").other_protocol().as_deref(), Some("SSH"));
        assert_eq!(first(b"NBDMAGIC").other_protocol().as_deref(), Some("plain NBD"));
        assert!(first(&[0x80, 0x2e, 1, 0, 2]).other_protocol().is_some_and(|what| what.starts_with("SSL 2")));
        assert!(first(b"\x16\x03\x01\x02").other_protocol().is_none());
        assert!(first(b"\x15\x03\x03\x00\x02").other_protocol().is_none());
        assert!(first(b"\x16").other_protocol().is_none());
        assert_eq!(
            first(b"\x00ab").other_protocol().as_deref(),
            Some("something that begins with \"\\x00ab\"")
        );
    }

    #[test]
    fn alerts_are_named() {
        let failure = alerted("the client", AlertDescription::UnknownCA);
        assert_eq!(failure.kind, ErrorKind::TlsAlert);
        assert!(failure.message.contains("unknown_ca (48)"), "{}", failure.message);
        let failure = alerted("the client", AlertDescription::from(200));
        assert!(failure.message.contains("alert 200"), "{}", failure.message);
        assert_eq!(alerted("x", AlertDescription::ProtocolVersion).kind, ErrorKind::TlsNoCommonParameters);
    }
}
