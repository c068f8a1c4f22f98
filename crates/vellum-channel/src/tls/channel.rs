//! A TLS channel: plaintext above, a channel below.

use super::control::{TlsControls, Waiting};
use super::failure::{Failure, Peer};
use super::session::{Session, is_gone};
use crate::channel::stream_of_channel;
use crate::channel::{Base, Channel, Closed, Features, Interest, ReadFlags, WriteFlags};
use crate::control::Control;
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::{Error, ErrorKind, error};
use crate::poll_fd::closed;
use rustls::{Connection, ProtocolVersion};
use std::fmt::{self, Debug};
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Sleep;

/// Reads from below in one poll that lead to no plaintext: after that many, others get a turn.
const ROUNDS_MAX: usize = 64;

/// A channel encrypted by TLS. Made by [`TlsClient::connect`](crate::TlsClient::connect) and
/// [`TlsServer::accept`](crate::TlsServer::accept).
///
/// * The stream ends with the peer's goodbye (`close_notify`). Without it, it may have been cut:
///   [`ErrorKind::TlsTruncated`], unless the read asks for
///   [`RELAXED_EOF`](crate::ReadFlags::RELAXED_EOF) or this side has shut down reading.
/// * A write encrypts up to 64 KiB, and is done when that is in the buffer of the channel. What the channel below does
///   not take at once goes with a later write, flush, read or close.
/// * [`AsyncWriteExt::shutdown`](tokio::io::AsyncWriteExt::shutdown) says goodbye; one can go on reading then.
///   [`Control::shutdown`](crate::Control::shutdown) acts at once, without a word: the peer finds a stream that was cut.
/// * Closing says goodbye too. A peer that does not read can hold that up for the time set in the options; if bytes
///   that were written could not be sent, the close says so. Dropping the channel says nothing.
///
/// # What is bounded
/// * The handshake ends within the time set in the options, 10 s unless set; a close waits for a peer that does not read
///   for at most 5 s unless set.
/// * A handshake message, and with it a chain of certificates, has at most 64 KiB, a record 16 KiB.
/// * At most 32 key updates in a row, one request to renegotiate (it is refused), four warnings: more is an error.
/// * Buffers: 64 KiB towards the peer; from it 20 KiB, or 160 KiB where it sends much, one record and its plaintext.
pub struct Tls<C> {
    base: Base,
    below: C,
    session: Session,
    controls: Arc<TlsControls>,
    control: Control,
    waiting: Arc<Waiting>,
    /// Wakes `waiting`: what is registered below for writing.
    below_waker: Waker,
    ending: Ending,
    close_timeout: Duration,
    closing: Option<Pin<Box<Sleep>>>,
    /// Why bytes that were written could not be sent, for the close to tell.
    lost: Option<io::Error>,
    /// How the channel below closed, once it has.
    closed: Option<Closed>,
}

/// How far this side is in ending its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Open,
    /// A goodbye has been said into the buffer, behind data or not.
    Said {
        is_behind_data: bool,
    },
    /// It has been sent, or given up.
    Sent,
}

impl<C: Channel> Tls<C> {
    pub(super) fn new(below: C, session: Session, close_timeout: Duration) -> Self {
        let features = (below.features() & Features::SHUTDOWN) | Features::PEEK;
        let control_below = below.control();
        let controls = Arc::new(TlsControls::new(control_below));
        let waiting = Arc::<Waiting>::default();
        Self {
            base: Base::new("tls", features),
            below,
            session,
            control: Control::new(controls.clone(), Arc::default()),
            controls,
            below_waker: waiting.waker(),
            waiting,
            ending: Ending::Open,
            close_timeout,
            closing: None,
            lost: None,
            closed: None,
        }
    }

    /// The channel below.
    pub fn get_ref(&self) -> &C {
        &self.below
    }

    /// The application protocol that was agreed on.
    pub fn alpn(&self) -> Option<&str> {
        self.session.connection().alpn_protocol().and_then(|name| std::str::from_utf8(name).ok())
    }

    /// Whether the handshake was a short one, from a session of before.
    pub fn is_resumed(&self) -> bool {
        self.session.is_resumed()
    }

    /// The version that is spoken: `1.3` or `1.2`.
    pub fn version(&self) -> &'static str {
        match self.session.connection().protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "1.2",
            _ => "1.3",
        }
    }

    /// The cipher suite that was agreed on, as `TLS13_AES_256_GCM_SHA384`.
    pub fn cipher(&self) -> Option<String> {
        let suite = self.session.connection().negotiated_cipher_suite()?;
        Some(format!("{:?}", suite.suite()))
    }

    /// The host name that the client asked for, on either side; `None` for an IP address.
    pub fn server_name(&self) -> Option<&str> {
        match (self.session.connection(), self.session.peer()) {
            (Connection::Server(connection), _) => connection.server_name(),
            (_, Peer::Server(name)) => name.parse::<std::net::IpAddr>().is_err().then_some(name),
            _ => None,
        }
    }

    /// The peer's certificates in DER form, its own first; none if it gave none.
    pub fn peer_certificates(&self) -> impl Iterator<Item = &[u8]> {
        let chain = self.session.connection().peer_certificates().unwrap_or_default();
        chain.iter().map(AsRef::as_ref)
    }

    /// What the peer's certificate says; `None` if it gave none.
    pub fn peer_certificate(&self) -> Option<super::Certificate> {
        let own = self.peer_certificates().next()?;
        super::Certificate::from_der(own).ok()
    }

    fn check_open(&self) -> io::Result<()> {
        if self.closed.is_some() { Err(closed()) } else { Ok(()) }
    }

    fn is_writing_over(&self) -> bool {
        self.ending != Ending::Open || self.controls.is_write_ended()
    }

    /// Waits for plaintext; false at the end of the stream.
    fn poll_plaintext(&mut self, cx: &mut Context<'_>, flags: ReadFlags) -> Poll<io::Result<bool>> {
        for _ in 0..ROUNDS_MAX {
            // Also what the last round led to: an alert, or the answer to a request.
            self.help_send(cx);
            if self.controls.is_read_ended() {
                return Poll::Ready(Ok(false));
            }
            if !self.session.pending().is_empty() {
                return Poll::Ready(Ok(true));
            }
            if let Some(failure) = self.session.failure() {
                return Poll::Ready(Err(failure.to_error()));
            }
            if self.session.is_peer_done() {
                return Poll::Ready(Ok(false));
            }
            if self.session.is_below_done() {
                return Poll::Ready(self.cut(flags));
            }
            // Before the poll: the one who wakes must not miss it.
            self.waiting.add_reader(cx.waker());
            ready!(self.session.poll_receive(&mut self.below, cx, flags & ReadFlags::NO_WAIT))?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The end of the stream below, where the peer has not said goodbye.
    fn cut(&self, flags: ReadFlags) -> io::Result<bool> {
        if flags.contains(ReadFlags::RELAXED_EOF) {
            return Ok(false);
        }
        let (label, whom) = (self.label(), self.session.peer().whom());
        Err(error(
            ErrorKind::TlsTruncated,
            format!(
                "{label}: {whom} hung up without a TLS goodbye (close_notify): data may be missing at the end"
            ),
        ))
    }

    /// Passes on what waits to be sent, on behalf of whoever reads: alerts, and what a writer left behind. Its errors
    /// are the writer's.
    fn help_send(&mut self, cx: &mut Context<'_>) {
        if self.session.wants_send() {
            self.waiting.add_helper(cx.waker());
            let mut below = Context::from_waker(&self.below_waker);
            let _ = self.session.poll_flush(&mut self.below, &mut below);
        }
    }

    /// Sends what waits, on behalf of whoever writes.
    fn poll_send(&mut self, cx: &mut Context<'_>, flags: WriteFlags) -> Poll<io::Result<()>> {
        if !self.session.wants_send() {
            return Poll::Ready(Ok(()));
        }
        self.waiting.add_writer(cx.waker());
        let mut below = Context::from_waker(&self.below_waker);
        self.session.poll_send(&mut self.below, &mut below, flags)
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        self.waiting.add_writer(cx.waker());
        let mut below = Context::from_waker(&self.below_waker);
        let flushed = ready!(self.session.poll_flush(&mut self.below, &mut below));
        let flushed = flushed.map_err(|error| self.explain(error));
        Poll::Ready(match self.session.failure() {
            Some(failure) => Err(failure.to_error()),
            None => flushed,
        })
    }

    /// Why the channel below no longer takes anything: the peer may have said so in an alert that nobody has read yet.
    fn explain(&mut self, found: io::Error) -> io::Error {
        if crate::kind_of(&found).is_some() || !is_gone(&found) {
            return found;
        }
        // The reader's own registration below may be lost by this: it is woken to make another.
        let mut nobody = Context::from_waker(Waker::noop());
        for _ in 0..ROUNDS_MAX {
            let is_over = self.session.failure().is_some() || self.session.is_below_done();
            if is_over || !self.session.wants_receive() {
                break;
            }
            match self.session.poll_receive(&mut self.below, &mut nobody, ReadFlags::NO_WAIT) {
                Poll::Ready(Ok(())) => {}
                _ => break,
            }
        }
        self.waiting.wake_reader();
        self.session.failure().map_or(found, Failure::to_error)
    }

    /// Says goodbye into the buffer, if it has not been said.
    fn say_goodbye(&mut self) {
        if self.ending == Ending::Open {
            self.ending = Ending::Said { is_behind_data: self.session.wants_send() };
            self.session.say_goodbye();
        }
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        self.say_goodbye();
        if let Ending::Said { is_behind_data } = self.ending {
            let sent = ready!(self.poll_send_buffered(cx));
            self.ending = Ending::Sent;
            // A peer that is gone needs no goodbye, but misses data.
            match sent {
                Err(error) if is_behind_data => return Poll::Ready(Err(error)),
                _ => {}
            }
        }
        self.waiting.add_writer(cx.waker());
        let mut below = Context::from_waker(&self.below_waker);
        match ready!(Pin::new(&mut self.below).poll_shutdown(&mut below)) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            ended => Poll::Ready(ended),
        }
    }

    /// Sends the goodbye before a close, for as long as that may take. An error tells of data that could not be sent.
    fn poll_last_words(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.controls.is_write_ended() {
            self.ending = Ending::Sent;
        }
        self.say_goodbye();
        let Ending::Said { is_behind_data } = self.ending else { return Poll::Ready(Ok(())) };
        let sent = match self.poll_send_buffered(cx) {
            Poll::Ready(sent) => sent,
            Poll::Pending => {
                ready!(self.poll_patience(cx));
                Err(error(
                    ErrorKind::Timeout,
                    format!(
                        "{}: {} did not take the last bytes within {:?}: they are lost",
                        self.label(),
                        self.session.peer().whom(),
                        self.close_timeout
                    ),
                ))
            }
        };
        self.ending = Ending::Sent;
        Poll::Ready(if is_behind_data { sent } else { Ok(()) })
    }

    /// Takes from below what has come and nobody will read, such as the tickets of a server. A socket that is closed
    /// while it holds unread bytes is reset, and what it has still to send is lost.
    fn discard_received(&mut self) {
        let mut room = [0; 4096];
        let mut nobody = Context::from_waker(Waker::noop());
        for _ in 0..ROUNDS_MAX {
            let bufs = &mut [IoSliceMut::new(&mut room)];
            match self.below.poll_readv(&mut nobody, bufs, None, ReadFlags::NO_WAIT) {
                Poll::Ready(Ok(1..)) => {}
                _ => break,
            }
        }
    }

    /// Waits until a close has waited long enough.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.closing.is_none() && Handle::try_current().is_ok() {
            self.closing = Some(Box::pin(tokio::time::sleep(self.close_timeout)));
        }
        self.closing.as_mut().map_or(Poll::Pending, |sleep| sleep.as_mut().poll(cx))
    }
}

impl<C: Channel> Channel for Tls<C> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        self.control.clone()
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        if bufs.iter().all(|buf| buf.is_empty()) || !ready!(self.poll_plaintext(cx, flags))? {
            return Poll::Ready(Ok(0));
        }
        if flags.contains(ReadFlags::PEEK) {
            return Poll::Ready(Ok(crate::stream::scatter(self.session.pending(), bufs)));
        }
        let taken = self.session.take(bufs);
        // That may have come upon something to be answered.
        self.help_send(cx);
        Poll::Ready(Ok(taken))
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        if self.is_writing_over() {
            let what = format!("{}: writing has been shut down on this side", self.label());
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, what)));
        }
        if let Some(failure) = self.session.failure() {
            return Poll::Ready(Err(failure.to_error()));
        }
        if let Err(error) = ready!(self.poll_send(cx, flags)) {
            return Poll::Ready(Err(self.explain(error)));
        }
        let taken = self.session.put(bufs)?;
        if taken == 0 {
            let what = format!("{}: the keys of TLS 1.2 are used up: open a new connection", self.label());
            return Poll::Ready(Err(Error::new(ErrorKind::Limit, what).into()));
        }
        // Whatever comes of it: these bytes are taken. An error shows again in the next operation.
        let _ = self.poll_send(cx, flags);
        Poll::Ready(Ok(taken))
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.check_open()?;
        let mut found = Interest::empty();
        if interest.contains(Interest::READ) {
            match self.poll_plaintext(cx, ReadFlags::RELAXED_EOF) {
                // What has failed for good fails again in the read. An error from below may not.
                Poll::Ready(Err(error)) if self.session.failure().is_none() => {
                    return Poll::Ready(Err(error));
                }
                polled => found.set(Interest::READ, polled.is_ready()),
            }
        }
        if interest.contains(Interest::WRITE) {
            let is_ended = self.is_writing_over() || self.session.failure().is_some();
            let is_ready = is_ended || self.poll_send(cx, WriteFlags::empty()).is_ready();
            found.set(Interest::WRITE, is_ready);
        }
        if found.is_empty() { Poll::Pending } else { Poll::Ready(Ok(found)) }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        if let Some(closed) = self.closed {
            return Poll::Ready(Ok(closed));
        }
        let last_words = ready!(self.poll_last_words(cx));
        if let Err(lost) = last_words {
            self.lost.get_or_insert(lost);
        }
        self.discard_received();
        let closed = ready!(self.below.poll_close(cx));
        self.closed = Some(*closed.as_ref().unwrap_or(&Closed::default()));
        self.closing = None;
        self.waiting.wake_all();
        Poll::Ready(match self.lost.take() {
            Some(lost) => Err(lost),
            None => closed,
        })
    }

    fn detach(&mut self) -> io::Result<()> {
        self.closing = None;
        self.below.detach()
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.closing = None;
        self.below.attach(executor)
    }

    fn local_endpoint(&self) -> io::Result<Endpoint> {
        self.below.local_endpoint()
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        self.below.peer_endpoint()
    }

    fn peer_process(&self) -> io::Result<PeerProcess> {
        self.below.peer_process()
    }
}

stream_of_channel!([C: Channel] Tls<C>);

impl<C: Debug> Debug for Tls<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("base", &self.base).field("below", &self.below).finish_non_exhaustive()
    }
}
