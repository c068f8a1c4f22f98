//! WebSocket (RFC 6455): a stream of bytes in binary messages, over any other channel.
//!
//! The opening handshake is read by `httparse` within bounds ([`server`], [`client`]). Frames are read and written here
//! ([`receive`], [`send`]): payload goes straight between the inner channel and the user's buffers, so that no message,
//! however large, is held in memory; the libraries for it hand out whole messages.

mod channel;
mod client;
mod closing;
mod frame;
mod head;
mod input;
mod options;
mod output;
mod ping;
mod receive;
mod send;
mod server;
mod wakers;

pub use options::WebSocketOptions;
pub use ping::Pinger;

use crate::channel::{Base, Channel, Features};
use crate::error::{ErrorKind, error};
use channel::InnerControls;
use closing::Closing;
use frame::status;
use head::Input;
use input::Progress;
use ping::{KeepAlive, Pings};
use receive::{Limits, Receiver};
use send::{Sender, close_payload};
use std::fmt::{self, Debug};
use std::future::{Future, poll_fn};
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, timeout};
use wakers::Wakers;

/// A WebSocket over another channel: TCP, TLS, or any other.
///
/// It is a stream of bytes: every write is sent as one binary message (of at most
/// [`write_max`](WebSocketOptions::write_max) bytes), and reads do not show where messages end. Text is refused, and no
/// extension (compression) is ever agreed on. Pings are answered while somebody reads, writes or waits.
///
/// * **Ending.** Tokio's `shutdown` sends the close frame behind all that was written. A WebSocket has no half-close:
///   the peer answers with its own close frame and sends no more, though what is on its way then still arrives. `close`
///   does the same, waits for the answer ([`close_timeout`](WebSocketOptions::close_timeout)), and closes the inner
///   channel. One that is dropped instead looks cut to the peer.
/// * **The peer's end.** Its close frame is the end of the stream if the code is 1000, 1001 or none; with another code
///   it is an error of kind [`ErrorKind::WebSocketClosed`]. Without a close frame it is
///   [`ErrorKind::UnexpectedEof`], unless read with [`RELAXED_EOF`](crate::ReadFlags::RELAXED_EOF).
/// * **A hostile peer** is told by a close frame what was wrong (1002, 1003, 1007, 1008, 1009), and the read fails with
///   [`ErrorKind::WebSocketProtocol`] or [`ErrorKind::Limit`]. Memory: 8 KiB for reading; for writing what the inner
///   channel does not take at once, at most 64 KiB and one message.
/// * [`Control::shutdown`](crate::Control::shutdown) acts on the inner channel, without a goodbye.
///
/// A runtime with time (`enable_time`, `enable_all`) is needed.
///
/// ```
/// # use vellum_channel::{Stream, WebSocket, WebSocketOptions};
/// # use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// let (near, far) = tokio::io::duplex(4096);
/// let options = WebSocketOptions::default();
/// let (client, server) = tokio::join!(
///     WebSocket::connect(Stream::new(near), "localhost", &options),
///     WebSocket::accept(Stream::new(far), &options),
/// );
/// let (mut client, mut server) = (client?, server?);
/// client.write_all(b"hello").await?;
/// client.shutdown().await?;
/// let mut got = String::new();
/// server.read_to_string(&mut got).await?;
/// assert_eq!(got, "hello");
/// # Ok(())
/// # }
/// ```
pub struct WebSocket<C> {
    base: Base,
    inner: C,
    controls: Arc<InnerControls>,
    wakers: Arc<Wakers>,
    receiver: Receiver,
    /// How often a reader in the middle of a frame asks again before it sleeps.
    asks_left: u32,
    sender: Sender,
    pings: Pings,
    keep_alive: Option<KeepAlive>,
    /// Why there is no more to read.
    end: Option<End>,
    /// The inner channel has nothing more to read, whatever was the end before that.
    is_inner_over: bool,
    /// Met while looking whether there is something to read.
    read_error: Option<io::Error>,
    has_ended_inner: bool,
    closing: Closing,
    close_timeout: Duration,
    write_max: usize,
    path: String,
    protocol: Option<String>,
}

/// How the peer closed a WebSocket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WebSocketClose {
    /// The status code; `None` if it gave none.
    pub code: Option<u16>,
    /// The reason in words, as the peer wrote it (not escaped); often empty.
    pub reason: String,
}

impl WebSocketClose {
    fn is_normal(&self) -> bool {
        matches!(self.code, None | Some(status::NORMAL | status::GOING_AWAY))
    }
}

/// Why there is no more to read.
#[derive(Debug)]
enum End {
    Closed(WebSocketClose),
    /// The inner channel ended without a close frame.
    Cut,
    Failed {
        kind: ErrorKind,
        message: String,
    },
}

impl<C: Channel> WebSocket<C> {
    /// Makes a WebSocket of a channel to a server. `host` is what goes into the request: the server's name, with the
    /// port if it is not the usual one.
    ///
    /// Dropping the future drops the channel.
    ///
    /// # Errors
    /// [`ErrorKind::WebSocketHandshake`] when the server does not switch to WebSocket, [`ErrorKind::Limit`] when its
    /// answer is too long, [`ErrorKind::Timeout`], [`ErrorKind::Invalid`] for options or a host that cannot be sent.
    pub async fn connect(mut channel: C, host: &str, options: &WebSocketOptions) -> io::Result<Self> {
        options.check()?;
        let handshake = client::connect(&mut channel, host, options);
        let Ok(done) = timeout(options.handshake_timeout, handshake).await else {
            return Err(too_slow(&channel, options));
        };
        let (input, protocol) = done?;
        Ok(Self::new(channel, true, input, options.path.clone(), protocol, options))
    }

    /// Makes a WebSocket of a channel from a client. A client that asks for something else gets an answer of HTTP: 400,
    /// 403 (origin), 404 (path) or 431 (too long).
    ///
    /// Dropping the future drops the channel.
    ///
    /// # Errors
    /// [`ErrorKind::WebSocketHandshake`] for a request that is not one of WebSocket, [`ErrorKind::Refused`] for a wrong
    /// origin, [`ErrorKind::Limit`] for one that is too long, [`ErrorKind::Timeout`].
    pub async fn accept(mut channel: C, options: &WebSocketOptions) -> io::Result<Self> {
        options.check()?;
        let handshake = server::accept(&mut channel, options);
        let Ok(done) = timeout(options.handshake_timeout, handshake).await else {
            return Err(too_slow(&channel, options));
        };
        let server::Agreed { input, path, protocol } = done?;
        Ok(Self::new(channel, false, input, path, protocol, options))
    }

    fn new(
        inner: C,
        is_client: bool,
        input: Input,
        path: String,
        protocol: Option<String>,
        options: &WebSocketOptions,
    ) -> Self {
        let limits = Limits { message: options.message_max, frame: options.frame_max, is_masked: !is_client };
        let features = Features::PEEK | (inner.features() & Features::SHUTDOWN);
        let wakers = Arc::<Wakers>::default();
        let name = inner.name().to_owned();
        let mut made = Self {
            base: Base::new("websocket", features),
            controls: Arc::new(InnerControls::new(inner.control())),
            inner,
            asks_left: 0,
            receiver: Receiver::new(limits, input.bytes, input.head, input.end),
            sender: Sender::new(is_client),
            pings: Pings::new(wakers.clone()),
            wakers,
            keep_alive: options.keep_alive.map(KeepAlive::new),
            end: None,
            is_inner_over: false,
            read_error: None,
            has_ended_inner: false,
            closing: Closing::default(),
            close_timeout: options.close_timeout,
            write_max: options.write_len(),
            path,
            protocol,
        };
        made.set_name(&name);
        made
    }

    /// The subprotocol that was agreed on.
    pub fn protocol(&self) -> Option<&str> {
        self.protocol.as_deref()
    }

    /// What the client asked for: path and query.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How the peer closed, once a read has found that.
    pub fn peer_close(&self) -> Option<&WebSocketClose> {
        match &self.end {
            Some(End::Closed(close)) => Some(close),
            _ => None,
        }
    }

    /// Ends writing with a status code other than 1000, and a reason (cut to 123 bytes). It is sent by what comes next:
    /// a flush, a shutdown, a close.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a code that may not be sent: those that may are 1000 to 1003, 1007 to 1014, and 3000
    /// to 4999.
    pub fn end_with(&mut self, code: u16, reason: &str) -> io::Result<()> {
        if !frame::may_be_sent(code) {
            return Err(error(
                ErrorKind::Invalid,
                format!("the WebSocket status code {code} may not be sent"),
            ));
        }
        self.sender.close(close_payload(code, reason));
        Ok(())
    }

    /// What pings the peer while other tasks use the WebSocket.
    pub fn pinger(&self) -> Pinger {
        self.pings.pinger()
    }

    /// Sends a ping and waits for the answer; tells how long that took.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when data come before the answer: they have to be read first, or the answer awaited by
    /// [`pinger`](WebSocket::pinger) while they are read. [`ErrorKind::WebSocketClosed`] when the WebSocket has ended.
    pub fn ping(&mut self) -> impl Future<Output = io::Result<Duration>> {
        let started = Instant::now();
        let number = self.pings.request();
        poll_fn(move |cx| self.poll_pong(cx, number).map_ok(|()| started.elapsed()))
    }

    fn poll_pong(&mut self, cx: &mut Context<'_>, number: u64) -> Poll<io::Result<()>> {
        self.check_open()?;
        self.push_answers(cx, crate::WriteFlags::empty());
        let polled = self.poll_payload(cx);
        self.push_answers(cx, crate::WriteFlags::empty());
        if self.pings.is_answered(number) {
            return Poll::Ready(Ok(()));
        }
        let (kind, why) = match ready!(polled)? {
            Progress::Payload => {
                (ErrorKind::Invalid, "data came before it: read them first, or use a `Pinger`")
            }
            _ => (ErrorKind::WebSocketClosed, "it has ended"),
        };
        Poll::Ready(Err(error(kind, format!("{}: no answer to the ping was found: {why}", self.label()))))
    }

    /// The inner channel.
    pub fn get_ref(&self) -> &C {
        &self.inner
    }

    /// The inner channel, and the bytes that were read from it and not used. What was written and not flushed is lost.
    pub fn into_inner(self) -> (C, Vec<u8>) {
        let unused = self.receiver.unused().to_vec();
        (self.inner, unused)
    }
}

fn too_slow<C: Channel>(channel: &C, options: &WebSocketOptions) -> io::Error {
    let time = options.handshake_timeout;
    error(
        ErrorKind::Timeout,
        format!("{}: the WebSocket handshake took longer than {time:?}", channel.label()),
    )
}

impl<C: Debug> Debug for WebSocket<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSocket")
            .field("base", &self.base)
            .field("inner", &self.inner)
            .field("is_client", &self.sender.is_masking())
            .field("protocol", &self.protocol)
            .field("queued", &self.sender.queued().len())
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
