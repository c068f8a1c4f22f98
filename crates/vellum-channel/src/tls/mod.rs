//! TLS over any channel, by rustls.
//!
//! [`TlsClient`] and [`TlsServer`] hold what is decided once: trust anchors, certificate and key, versions, application
//! protocols. Each makes a [`Tls`] channel of a channel whose other end speaks TLS. TLS 1.3 is the default, TLS 1.2 an
//! option; there is no 0-RTT and no renegotiation. Certificates are always verified, of servers with their name.
//!
//! What a peer can do wrong has an [`ErrorKind`](crate::ErrorKind) of its own, and a message that names the
//! certificate, what was expected and what to do.

mod certificate;
mod channel;
mod client;
mod config;
mod control;
mod credentials;
mod failure;
mod handshake;
mod input;
mod names;
mod options;
mod server;
mod session;
mod verify;

pub use certificate::Certificate;
pub use channel::Tls;
pub use client::TlsClient;
pub use options::{ClientCertificates, Pem, TlsClientOptions, TlsIdentity, TlsServerOptions, TlsVersions};
pub use server::TlsServer;
