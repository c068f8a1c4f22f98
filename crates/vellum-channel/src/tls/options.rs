//! What to decide before the first connection.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a close waits for the peer to take what was written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where certificates, keys and revocation lists come from: text in PEM form (`-----BEGIN ...`).
#[derive(Clone, PartialEq, Eq)]
pub enum Pem {
    /// A file. It is read again by [`TlsServer::reload`](crate::TlsServer::reload).
    File(PathBuf),
    /// Text in memory.
    Text(Vec<u8>),
}

impl Pem {
    /// A file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::File(path.into())
    }

    /// Text in memory.
    pub fn text(text: impl Into<Vec<u8>>) -> Self {
        Self::Text(text.into())
    }
}

impl fmt::Debug for Pem {
    /// Never the text: it may be a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
        }
    }
}

impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "the file {}", path.display()),
            Self::Text(text) => write!(f, "the given PEM text ({} bytes)", text.len()),
        }
    }
}

/// Who this side is: a certificate with its chain, and the key that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsIdentity {
    /// This side's own certificate first, then those of its issuers, without the trust anchor.
    pub certificates: Pem,
    /// The private key: PKCS#8, PKCS#1 or SEC1, not encrypted.
    pub key: Pem,
}

impl TlsIdentity {
    /// An identity of certificates and key, which may be the same file.
    pub fn new(certificates: Pem, key: Pem) -> Self {
        Self { certificates, key }
    }
}

/// The versions of TLS that are spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TlsVersions {
    /// TLS 1.3 only.
    #[default]
    Tls13,
    /// TLS 1.3, and 1.2 for peers that know no better.
    Tls12AndLater,
    /// TLS 1.2 only: to find out whether a peer has trouble with 1.3.
    Tls12,
}

/// Whether a server asks its clients for certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ClientCertificates {
    /// It does not ask.
    #[default]
    None,
    /// It asks; clients without one are served, those with a bad one are not.
    Optional,
    /// It asks, and serves only those with a good one.
    Required,
}

/// What a [`TlsClient`](crate::TlsClient) is made with.
#[derive(Clone, Debug)]
pub struct TlsClientOptions {
    /// The issuers that are trusted; those of the system if none are given.
    pub ca: Option<Pem>,
    /// The certificate and key to show to servers that ask for one.
    pub identity: Option<TlsIdentity>,
    /// Lists of revoked certificates, each signed by its issuer. Issuers without a list are not checked; a list that is
    /// out of date lets no certificate of its issuer pass.
    pub crls: Vec<Pem>,
    /// Application protocols in order of preference. If there are any, the server must choose one.
    pub alpn: Vec<String>,
    /// The name to ask for and to find in the certificate, in place of the one given to
    /// [`TlsClient::connect`](crate::TlsClient::connect): a host name or an IP address.
    pub server_name: Option<String>,
    /// The versions that are spoken.
    pub versions: TlsVersions,
    /// How long a handshake may take: 10 s.
    pub handshake_timeout: Duration,
    /// How long a close waits for the peer to take what was written: 5 s.
    pub close_timeout: Duration,
    /// Whether sessions are kept (in memory, at most 256 of them) to make later handshakes shorter.
    pub resumption: bool,
}

impl Default for TlsClientOptions {
    fn default() -> Self {
        Self {
            ca: None,
            identity: None,
            crls: Vec::new(),
            alpn: Vec::new(),
            server_name: None,
            versions: TlsVersions::default(),
            handshake_timeout: HANDSHAKE_TIMEOUT,
            close_timeout: CLOSE_TIMEOUT,
            resumption: true,
        }
    }
}

/// What a [`TlsServer`](crate::TlsServer) is made with.
#[derive(Clone, Debug)]
pub struct TlsServerOptions {
    /// The certificate and key to show to clients.
    pub identity: TlsIdentity,
    /// Whether clients are asked for certificates.
    pub client_certificates: ClientCertificates,
    /// The issuers that are trusted to vouch for clients. Needed if clients are asked, and an error if they are not.
    pub ca: Option<Pem>,
    /// The clients that are served, of those with a good certificate; all of them if the list is empty.
    ///
    /// A pattern with `=` in it is held against the whole subject in the order of the certificate, as
    /// `C=UK,CN=qemu*`; any other against the subject's common name and each DNS name, IP address and URI of the
    /// certificate, as `*.hosts.example.org`. `*` stands for any characters, `?` for one. Once the list is not empty,
    /// clients without a certificate are not served either.
    pub allowed_names: Vec<String>,
    /// Lists of revoked certificates, see [`TlsClientOptions::crls`].
    pub crls: Vec<Pem>,
    /// Application protocols in order of preference. If there are any, the client must offer one of them.
    pub alpn: Vec<String>,
    /// The versions that are spoken.
    pub versions: TlsVersions,
    /// How long a handshake may take: 10 s.
    pub handshake_timeout: Duration,
    /// How long a close waits for the peer to take what was written: 5 s.
    pub close_timeout: Duration,
    /// Whether clients get tickets to make later handshakes shorter. They are encrypted with keys of this
    /// [`TlsServer`](crate::TlsServer), which keeps nothing else of them, and end with a reload.
    pub resumption: bool,
}

impl TlsServerOptions {
    /// A server that shows `identity` and asks for no certificates.
    pub fn new(identity: TlsIdentity) -> Self {
        Self {
            identity,
            client_certificates: ClientCertificates::default(),
            ca: None,
            allowed_names: Vec::new(),
            crls: Vec::new(),
            alpn: Vec::new(),
            versions: TlsVersions::default(),
            handshake_timeout: HANDSHAKE_TIMEOUT,
            close_timeout: CLOSE_TIMEOUT,
            resumption: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_not_printed() {
        let secret = Pem::text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n");
        assert!(!format!("{secret:?} {secret}").contains("c2VjcmV0"));
    }
}
