//! The two ends of each contender.

use super::setup::TlsSetup;
use super::{Result, explain};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use tokio::io::{AsyncRead, AsyncWrite};
use vellum_channel::{Socket, WebSocket, WebSocketOptions};

/// Any stream: raw ones and channels go through the same code.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
pub type End = Box<dyn Stream>;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    RawTcp,
    Tcp,
    RawUnix,
    Unix,
    RawTls,
    Tls,
    WebSocket,
}

impl Kind {
    /// Two connected sockets, as every contender gets them: the client's, and the server's.
    pub fn sockets(self) -> Result<[OwnedFd; 2]> {
        let make = || match self {
            Self::RawUnix | Self::Unix => {
                let (near, far) = UnixStream::pair()?;
                Ok([near.into(), far.into()])
            }
            _ => {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                let near = TcpStream::connect(listener.local_addr()?)?;
                let (far, _) = listener.accept()?;
                near.set_nodelay(true)?;
                far.set_nodelay(true)?;
                Ok([near.into(), far.into()])
            }
        };
        make().map_err(explain)
    }

    /// One end, over its socket, on the current executor.
    pub async fn end(self, socket: OwnedFd, is_client: bool, tls: &TlsSetup) -> std::io::Result<End> {
        let raw = |socket: OwnedFd| {
            let stream = TcpStream::from(socket);
            stream.set_nonblocking(true)?;
            tokio::net::TcpStream::from_std(stream)
        };
        Ok(match (self, is_client) {
            (Self::RawTcp, _) => Box::new(raw(socket)?),
            (Self::RawUnix, _) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(true)?;
                Box::new(tokio::net::UnixStream::from_std(stream)?)
            }
            (Self::Tcp | Self::Unix, _) => Box::new(Socket::from_fd(socket)?),
            (Self::RawTls, true) => Box::new(tls.connector.connect(tls.name.clone(), raw(socket)?).await?),
            (Self::RawTls, false) => Box::new(tls.acceptor.accept(raw(socket)?).await?),
            (Self::Tls, true) => Box::new(tls.client.connect(Socket::from_fd(socket)?, "localhost").await?),
            (Self::Tls, false) => Box::new(tls.server.accept(Socket::from_fd(socket)?).await?),
            (Self::WebSocket, is_client) => {
                let (channel, options) = (Socket::from_fd(socket)?, WebSocketOptions::default());
                Box::new(match is_client {
                    true => WebSocket::connect(channel, "localhost", &options).await?,
                    false => WebSocket::accept(channel, &options).await?,
                })
            }
        })
    }

    /// Both ends on the current executor.
    pub async fn ends(self, tls: &TlsSetup) -> Result<(End, End)> {
        let [near, far] = self.sockets()?;
        tokio::try_join!(self.end(near, true, tls), self.end(far, false, tls)).map_err(explain)
    }
}
