//! One connection's TLS, between a channel below and plaintext above.

use super::failure::{Failure, FirstBytes, Peer, Scene};
use super::input::Ciphertext;
use super::verify::take_refused;
use crate::channel::{Channel, ReadFlags, WriteFlags};
use crate::error::{Error, ErrorKind};
use rustls::{Connection, HandshakeKind};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// The state of rustls, and how the connection ended if it has.
#[derive(Debug)]
pub(super) struct Session {
    connection: Box<Connection>,
    peer: Peer,
    first: FirstBytes,
    input: Ciphertext,
    failure: Option<Failure>,
    /// The peer has said goodbye.
    is_peer_done: bool,
    /// The channel below has ended.
    is_below_done: bool,
    /// The channel below has taken records and not been flushed.
    is_below_unflushed: bool,
}

impl Session {
    pub fn new(connection: Connection, peer: Peer) -> Self {
        Self {
            connection: Box::new(connection),
            peer,
            first: FirstBytes::default(),
            input: Ciphertext::default(),
            failure: None,
            is_peer_done: false,
            is_below_done: false,
            is_below_unflushed: false,
        }
    }

    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    pub fn is_resumed(&self) -> bool {
        self.connection.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Whether the peer has sent nothing at all.
    pub fn has_heard_nothing(&self) -> bool {
        self.first.is_empty()
    }

    /// What ended the connection for good.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// Ends the connection for good, by a rule that rustls does not know.
    pub fn fail(&mut self, failure: Failure) {
        self.connection.send_close_notify();
        self.failure.get_or_insert(failure);
    }

    /// Ends it by an error of rustls.
    pub fn fail_by(&mut self, found: &rustls::Error) {
        let scene = Scene {
            peer: &self.peer,
            first: self.first,
            is_handshaking: self.connection.is_handshaking(),
            refused: take_refused(),
        };
        let failure = scene.failure(found);
        self.failure.get_or_insert(failure);
    }

    pub fn is_peer_done(&self) -> bool {
        self.is_peer_done
    }

    pub fn is_below_done(&self) -> bool {
        self.is_below_done
    }

    /// Decrypted bytes that wait to be read.
    pub fn pending(&mut self) -> &[u8] {
        // Nothing to read is an error or an empty slice there, depending on the reason.
        self.connection.reader().into_first_chunk().unwrap_or_default()
    }

    /// Whether rustls takes more from below: not while plaintext waits.
    pub fn wants_receive(&self) -> bool {
        self.connection.wants_read()
    }

    /// Moves decrypted bytes into `bufs`, in order, and decrypts for that what has come already.
    pub fn take(&mut self, bufs: &mut [IoSliceMut<'_>]) -> usize {
        let mut taken = 0;
        for buf in bufs {
            let mut filled = 0;
            while filled < buf.len() {
                match self.connection.reader().read(&mut buf[filled..]) {
                    Ok(count) if count > 0 => {
                        filled += count;
                        taken += count;
                    }
                    _ if self.failure.is_none() && !self.input.is_empty() && self.wants_receive() => {
                        self.digest();
                    }
                    _ => return taken,
                }
            }
        }
        taken
    }

    /// Decrypts what has come, and reads once from below if that is nothing. What it led to is found in the other
    /// methods; an error here is one of the channel below.
    pub fn poll_receive<C: Channel>(
        &mut self,
        below: &mut C,
        cx: &mut Context<'_>,
        flags: ReadFlags,
    ) -> Poll<io::Result<()>> {
        if self.input.is_empty() {
            if ready!(self.input.poll_fill(below, cx, flags))? == 0 {
                self.is_below_done = true;
                return Poll::Ready(Ok(()));
            }
            self.first.add(self.input.unread());
        }
        self.digest();
        Poll::Ready(Ok(()))
    }

    /// Hands rustls as much of what has come as it takes, which is about one full record, and has it decrypt that.
    fn digest(&mut self) {
        let mut has_taken = false;
        while !self.input.is_empty() {
            match self.connection.read_tls(&mut self.input) {
                Ok(1..) => has_taken = true,
                // Behind the goodbye nothing is read.
                Ok(0) => break,
                // Its own buffer is full: of records that it has still to decrypt, or of one message.
                Err(_) if has_taken => break,
                Err(error) => {
                    let whom = self.peer.whom();
                    let what = format!("{whom} sent a message above the limits of TLS: {error}");
                    self.failure.get_or_insert(Failure::new(ErrorKind::Limit, what));
                    return;
                }
            }
        }
        self.process();
    }

    fn process(&mut self) {
        match self.connection.process_new_packets() {
            Ok(state) => self.is_peer_done = state.peer_has_closed(),
            Err(found) => self.fail_by(&found),
        }
    }

    /// Whether records wait to be written below.
    pub fn wants_send(&self) -> bool {
        self.connection.wants_write()
    }

    /// Writes all records that wait.
    pub fn poll_send<C: Channel>(
        &mut self,
        below: &mut C,
        cx: &mut Context<'_>,
        flags: WriteFlags,
    ) -> Poll<io::Result<()>> {
        while self.connection.wants_write() {
            let mut output = Output { below, cx, flags, is_pending: false };
            match self.connection.write_tls(&mut output) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => self.is_below_unflushed = true,
                Err(_) if output.is_pending => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes all records that wait, and has the channel below send them.
    pub fn poll_flush<C: Channel>(&mut self, below: &mut C, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(below, cx, WriteFlags::empty()))?;
        if self.is_below_unflushed {
            ready!(Pin::new(below).poll_flush(cx))?;
            self.is_below_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Encrypts bytes of `bufs` into the buffer, up to its limit.
    pub fn put(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.connection.writer().write_vectored(bufs)
    }

    /// Says goodbye to the peer, once.
    pub fn say_goodbye(&mut self) {
        self.connection.send_close_notify();
    }

    /// Goes on with the handshake until both sides have agreed.
    pub fn poll_handshake<C: Channel>(
        &mut self,
        below: &mut C,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let sent = self.poll_flush(below, cx);
            if !self.is_handshaking() {
                return self.handshake_done(sent);
            }
            // Received is also while sending has to wait or has failed: both ends may be sending through a narrow channel,
            // and a peer that closes tells why in an alert.
            let unsent = match sent {
                Poll::Ready(Err(error)) => Some(error),
                _ => None,
            };
            match self.poll_receive(below, cx, ReadFlags::empty()) {
                Poll::Ready(received) => received?,
                Poll::Pending => return unsent.map_or(Poll::Pending, |error| Poll::Ready(Err(error))),
            }
            if let Some(failure) = &self.failure {
                return Poll::Ready(Err(failure.to_error()));
            }
            if self.is_below_done {
                return Poll::Ready(Err(unsent.unwrap_or_else(|| self.hung_up().into())));
            }
        }
    }

    /// A client's last message must go out; what a server still has to say (tickets) can wait, and a client that has
    /// gone meanwhile may have left data.
    fn handshake_done(&self, sent: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
        match self.connection.as_ref() {
            Connection::Client(_) => sent,
            Connection::Server(_) => Poll::Ready(Ok(())),
        }
    }

    fn hung_up(&self) -> Error {
        let what = if self.has_heard_nothing() {
            "hung up without a word: does it expect TLS on this port, and this side on its list of peers?"
        } else {
            "hung up in the middle of the TLS handshake: see its log"
        };
        Error::new(ErrorKind::TlsTruncated, format!("{} {what}", self.peer.whom()))
    }

    /// An error of a handshake: that a socket tells of a peer that has gone is put in words.
    pub fn hung_up_by(&self, error: io::Error) -> io::Error {
        if crate::kind_of(&error).is_none() && is_gone(&error) {
            self.hung_up().because(error).into()
        } else {
            error
        }
    }
}

/// Whether it says that the peer has closed its end.
pub(super) fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
}

/// The channel below as rustls writes it.
struct Output<'a, 'b, C> {
    below: &'a mut C,
    cx: &'a mut Context<'b>,
    flags: WriteFlags,
    is_pending: bool,
}

impl<C: Channel> Write for Output<'_, '_, C> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.below.poll_writev(self.cx, bufs, &[], self.flags) {
            Poll::Ready(written) => written,
            Poll::Pending => {
                self.is_pending = true;
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
