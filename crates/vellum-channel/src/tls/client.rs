//! TLS towards servers.

use super::channel::Tls;
use super::config;
use super::failure::Peer;
use super::handshake::{Terms, shake};
use super::options::TlsClientOptions;
use crate::channel::Channel;
use crate::error::{Error, ErrorKind, error};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection};
use std::fmt;
use std::io;
use std::sync::Arc;

/// Makes TLS channels towards servers. Clones are cheap, and share the sessions that make later handshakes shorter.
///
/// ```no_run
/// # async fn example(socket: vellum_channel::Stream<tokio::net::TcpStream>) -> std::io::Result<()> {
/// use vellum_channel::{Pem, TlsClient, TlsClientOptions};
///
/// let options = TlsClientOptions { ca: Some(Pem::file("ca.pem")), ..TlsClientOptions::default() };
/// let client = TlsClient::new(options)?;
/// let channel = client.connect(socket, "disks.example.org").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TlsClient {
    shared: Arc<Shared>,
}

struct Shared {
    config: Arc<ClientConfig>,
    terms: Terms,
    name: Option<String>,
}

impl TlsClient {
    /// Reads the certificates, keys and lists that `options` name. (Files are read on this thread.)
    ///
    /// # Errors
    /// [`ErrorKind::TlsCredentials`] if they cannot be used, [`ErrorKind::Invalid`] for options that make no sense.
    pub fn new(options: TlsClientOptions) -> io::Result<Self> {
        let config = Arc::new(config::client(&options)?);
        let terms = Terms {
            handshake_timeout: options.handshake_timeout,
            close_timeout: options.close_timeout,
            alpn: options.alpn,
            returning: None,
        };
        if let Some(name) = &options.server_name {
            server_name(name)?;
        }
        Ok(Self { shared: Arc::new(Shared { config, terms, name: options.server_name }) })
    }

    /// Shakes hands with the server at the other end of `channel`, whose certificate must be for `name`: a host name or
    /// an IP address. ([`TlsClientOptions::server_name`] goes first.) Needs a Tokio runtime with timers.
    ///
    /// With TLS 1.3 a server looks at the client's certificate when the client is done already: if it refuses, the
    /// first read tells, or the first write after the refusal has come.
    ///
    /// # Errors
    /// Every `Tls...` kind of [`ErrorKind`], [`ErrorKind::Timeout`], [`ErrorKind::Limit`], and those of `channel`,
    /// which is closed then.
    pub async fn connect<C: Channel>(&self, channel: C, name: &str) -> io::Result<Tls<C>> {
        let name = self.shared.name.as_deref().unwrap_or(name);
        let wanted = server_name(name)?;
        let connection = ClientConnection::new(self.shared.config.clone(), wanted).map_err(|error| {
            let what = format!("cannot begin TLS with the server \"{name}\"");
            io::Error::from(Error::new(ErrorKind::Invalid, what).because(error))
        })?;
        shake(channel, Connection::Client(connection), Peer::Server(name.to_owned()), &self.shared.terms)
            .await
    }
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

/// A host name or address as certificates know it. The brackets of an IPv6 address and its zone are not part of it.
fn server_name(text: &str) -> io::Result<ServerName<'static>> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let bare = if bare.contains(':') { bare.split('%').next().unwrap_or(bare) } else { bare };
    ServerName::try_from(bare.to_owned()).map_err(|_| {
        let what = format!(
            "{text:?} is neither a host name nor an IP address, so no certificate can be for it: set the name to \
             expect (sni)"
        );
        error(ErrorKind::Invalid, what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_told_apart() {
        assert!(matches!(server_name("host.example.org"), Ok(ServerName::DnsName(_))));
        for address in ["127.0.0.1", "::1", "[::1]", "fe80::1%eth0", "[fe80::1%eth0]"] {
            assert!(matches!(server_name(address), Ok(ServerName::IpAddress(_))), "{address}");
        }
        for bad in ["", "a b", "/run/socket", "[host"] {
            let error = server_name(bad).expect_err("no name");
            assert_eq!(crate::kind_of(&error), Some(ErrorKind::Invalid), "{bad}");
        }
    }
}
