//! TLS towards clients.

use super::channel::Tls;
use super::config;
use super::failure::Peer;
use super::handshake::{Terms, shake};
use super::options::TlsServerOptions;
use crate::channel::Channel;
use crate::error::{Error, ErrorKind};
use parking_lot::Mutex;
use rustls::{Connection, ServerConfig, ServerConnection};
use std::fmt;
use std::io;
use std::sync::Arc;

/// Makes TLS channels towards clients. Clones are cheap and one server: a [`reload`](TlsServer::reload) of one is one
/// of all.
///
/// ```no_run
/// # async fn example(socket: vellum_channel::Stream<tokio::net::TcpStream>) -> std::io::Result<()> {
/// use vellum_channel::{ClientCertificates, Pem, TlsIdentity, TlsServer, TlsServerOptions};
///
/// let identity = TlsIdentity::new(Pem::file("server.pem"), Pem::file("server.key"));
/// let server = TlsServer::new(TlsServerOptions {
///     client_certificates: ClientCertificates::Required,
///     ca: Some(Pem::file("clients-ca.pem")),
///     allowed_names: vec!["*.hosts.example.org".to_owned()],
///     ..TlsServerOptions::new(identity)
/// })?;
/// let channel = server.accept(socket).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TlsServer {
    options: Arc<TlsServerOptions>,
    current: Arc<Mutex<Arc<Current>>>,
}

/// What was read of the options' files.
struct Current {
    config: Arc<ServerConfig>,
    terms: Terms,
}

impl TlsServer {
    /// Reads the certificates, keys and lists that `options` name. (Files are read on this thread.)
    ///
    /// # Errors
    /// [`ErrorKind::TlsCredentials`] if they cannot be used, [`ErrorKind::Invalid`] for options that make no sense.
    pub fn new(options: TlsServerOptions) -> io::Result<Self> {
        let current = Arc::new(Mutex::new(read(&options)?));
        Ok(Self { options: Arc::new(options), current })
    }

    /// Reads the files again. Later handshakes go by what is there now, and clients cannot come back with older
    /// tickets; channels that exist are not touched. (Files are read on this thread.)
    ///
    /// # Errors
    /// As [`new`](TlsServer::new); the server goes on with what it had.
    pub fn reload(&self) -> io::Result<()> {
        let fresh = read(&self.options)?;
        *self.current.lock() = fresh;
        Ok(())
    }

    /// Shakes hands with the client at the other end of `channel`. Needs a Tokio runtime with timers.
    ///
    /// # Errors
    /// Every `Tls...` kind of [`ErrorKind`], [`ErrorKind::Timeout`], [`ErrorKind::Limit`], and those of `channel`,
    /// which is closed then.
    pub async fn accept<C: Channel>(&self, channel: C) -> io::Result<Tls<C>> {
        let current = self.current.lock().clone();
        let connection = ServerConnection::new(current.config.clone()).map_err(|error| {
            io::Error::from(Error::new(ErrorKind::Invalid, "cannot begin TLS").because(error))
        })?;
        shake(channel, Connection::Server(connection), Peer::Client, &current.terms).await
    }
}

fn read(options: &TlsServerOptions) -> io::Result<Arc<Current>> {
    let (config, returning) = config::server(options)?;
    let terms = Terms {
        handshake_timeout: options.handshake_timeout,
        close_timeout: options.close_timeout,
        alpn: options.alpn.clone(),
        returning,
    };
    Ok(Arc::new(Current { config: Arc::new(config), terms }))
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer").field("options", &self.options).finish_non_exhaustive()
    }
}
