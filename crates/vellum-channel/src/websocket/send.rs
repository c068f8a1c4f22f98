//! What goes out: from payload to frames in a bounded queue. It does no I/O.

use super::frame::{CONTROL_MAX, Encoded, Header, Mask, Opcode};
use super::receive::Short;
use std::io::{self, IoSlice};

/// While more than this waits to be sent, no message is taken.
const QUEUE_HIGH: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Sender {
    /// Clients mask.
    masks: Option<Masks>,
    /// Whole frames (but for the sent part of the first): `queue[sent..end]`. At most `QUEUE_HIGH`, one message and
    /// three control frames. What lies behind is used again and again: to clear it each time takes longer than to mask.
    queue: Vec<u8>,
    sent: usize,
    end: usize,
    /// The answer to the peer's last ping. Older ones that are not answered yet need no answer any more.
    pong: Option<Short>,
    close: Goodbye,
    /// Frames were handed to the inner channel that nobody else will flush.
    pub needs_flush: bool,
    /// A write to the inner channel failed: the stream of frames is broken there.
    pub is_broken: bool,
}

#[derive(Debug)]
enum Goodbye {
    None,
    /// To be sent with this payload.
    Wanted(Short),
    /// In the queue, or sent.
    Queued,
}

impl Sender {
    pub fn new(is_client: bool) -> Self {
        Self {
            masks: is_client.then(Masks::default),
            queue: Vec::new(),
            sent: 0,
            end: 0,
            pong: None,
            close: Goodbye::None,
            needs_flush: false,
            is_broken: false,
        }
    }

    pub fn is_masking(&self) -> bool {
        self.masks.is_some()
    }

    /// What waits to be sent.
    pub fn queued(&self) -> &[u8] {
        &self.queue[self.sent..self.end]
    }

    /// Whether another message is taken.
    pub fn has_room(&self) -> bool {
        self.queued().len() < QUEUE_HIGH
    }

    /// So many bytes of the queue are sent.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.end {
            self.end = 0;
            self.sent = 0;
        }
    }

    /// Whether there is anything to send or to flush.
    pub fn has_work(&self) -> bool {
        let wants = self.pong.is_some() || matches!(self.close, Goodbye::Wanted(_));
        wants || self.needs_flush || !self.queued().is_empty()
    }

    /// Answers a ping.
    pub fn pong(&mut self, payload: Short) {
        self.pong = Some(payload);
    }

    /// Ends the stream of messages. The first reason stays.
    pub fn close(&mut self, payload: Short) {
        if matches!(self.close, Goodbye::None) {
            self.close = Goodbye::Wanted(payload);
        }
    }

    /// Whether the last message has been taken.
    pub fn is_closing(&self) -> bool {
        !matches!(self.close, Goodbye::None)
    }

    /// Whether the close frame and all before it are sent.
    pub fn has_closed(&self) -> bool {
        matches!(self.close, Goodbye::Queued) && self.queued().is_empty()
    }

    /// Nothing can be sent any more.
    pub fn break_off(&mut self) {
        self.is_broken = true;
        self.queue = Vec::new();
        self.sent = 0;
        self.end = 0;
        self.pong = None;
        self.needs_flush = false;
    }

    /// Queues the control frames that are due: the pong, a ping with `ping`, the close frame. Says whether it took the
    /// ping.
    pub fn queue_control(&mut self, ping: Option<[u8; 8]>) -> io::Result<bool> {
        if self.is_broken || matches!(self.close, Goodbye::Queued) {
            return Ok(false);
        }
        if let Some(payload) = self.pong.take() {
            self.queue_frame(Opcode::Pong, &[IoSlice::new(&payload)], payload.len())?;
        }
        if let Some(payload) = ping {
            self.queue_frame(Opcode::Ping, &[IoSlice::new(&payload)], payload.len())?;
        }
        if let Goodbye::Wanted(payload) = &self.close {
            let payload = payload.clone();
            self.queue_frame(Opcode::Close, &[IoSlice::new(&payload)], payload.len())?;
            self.close = Goodbye::Queued;
        }
        Ok(ping.is_some())
    }

    /// Queues a frame of the first `len` bytes in `bufs`.
    pub fn queue_frame(&mut self, opcode: Opcode, bufs: &[IoSlice<'_>], len: usize) -> io::Result<()> {
        let mut mask = self.begin_frame(opcode, len)?;
        self.queue_payload(bufs, 0, len, &mut mask);
        Ok(())
    }

    /// Queues the header of a frame, whose payload has to follow; gives its mask.
    pub fn begin_frame(&mut self, opcode: Opcode, len: usize) -> io::Result<Option<Mask>> {
        let mask = self.masks.as_mut().map(Masks::next).transpose()?;
        self.queue_bytes(Header::encode(opcode, len, mask).as_bytes());
        Ok(mask)
    }

    /// Queues the rest of a frame of which `done` bytes of header and payload are sent; never for clients.
    pub fn queue_rest(&mut self, header: &Encoded, bufs: &[IoSlice<'_>], len: usize, done: usize) {
        let header = header.as_bytes();
        let skip = done.saturating_sub(header.len());
        self.queue_bytes(&header[done.min(header.len())..]);
        self.queue_payload(bufs, skip, len - skip, &mut None);
    }

    /// Queues the next `len` bytes of a payload, those in `bufs` behind the first `skip`.
    pub fn queue_payload(
        &mut self,
        bufs: &[IoSlice<'_>],
        mut skip: usize,
        len: usize,
        mask: &mut Option<Mask>,
    ) {
        let mut to = self.add_room(len);
        for buf in bufs {
            let from = skip.min(buf.len());
            skip -= from;
            let part = &buf[from..];
            let part = &part[..to.len().min(part.len())];
            let (room, rest) = to.split_at_mut(part.len());
            match mask {
                Some(mask) => mask.copy(part, room),
                None => room.copy_from_slice(part),
            }
            to = rest;
        }
        debug_assert!(to.is_empty(), "a payload is as long as its header says");
    }

    fn queue_bytes(&mut self, bytes: &[u8]) {
        self.add_room(bytes.len()).copy_from_slice(bytes);
    }

    /// The next `len` bytes of the queue, to be filled. What is left is moved to the front rather than let the queue grow.
    fn add_room(&mut self, len: usize) -> &mut [u8] {
        if self.sent > 0 && self.end + len > self.queue.len() {
            self.queue.copy_within(self.sent..self.end, 0);
            self.end -= self.sent;
            self.sent = 0;
        }
        let (start, end) = (self.end, self.end + len);
        if end > self.queue.len() {
            self.queue.resize(end, 0);
        }
        self.end = end;
        &mut self.queue[start..end]
    }
}

/// Keys for masking that nobody can foretell: each is used for one frame.
struct Masks {
    pool: [u8; 256],
    used: usize,
}

impl Default for Masks {
    fn default() -> Self {
        Self { pool: [0; 256], used: 256 }
    }
}

impl Masks {
    fn next(&mut self) -> io::Result<Mask> {
        if self.used == self.pool.len() {
            getrandom::fill(&mut self.pool).map_err(io::Error::other)?;
            self.used = 0;
        }
        let mut key = [0; 4];
        key.copy_from_slice(&self.pool[self.used..self.used + 4]);
        self.used += 4;
        Ok(Mask(key))
    }
}

impl std::fmt::Debug for Masks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The keys to come stay secret.
        f.debug_struct("Masks").finish_non_exhaustive()
    }
}

/// The payload of a close frame: a status code and a reason, which is cut to fit.
pub(super) fn close_payload(code: u16, reason: &str) -> Short {
    let mut payload = Short::from_slice(&code.to_be_bytes());
    let end = reason.floor_char_boundary(CONTROL_MAX - payload.len());
    payload.extend_from_slice(&reason.as_bytes()[..end]);
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_ping_is_answered_and_nothing_follows_the_close() {
        let mut sender = Sender::new(false);
        sender.pong(Short::from_slice(b"one"));
        sender.pong(Short::from_slice(b"two"));
        sender.queue_control(None).expect("queued");
        assert_eq!(sender.queued(), b"\x8A\x03two");
        sender.sent(5);
        assert!(sender.queued().is_empty() && !sender.has_closed());
        sender.close(close_payload(1000, "bye"));
        sender.close(close_payload(1002, "late"));
        sender.pong(Short::from_slice(b"three"));
        sender.queue_control(None).expect("queued");
        assert_eq!(sender.queued(), b"\x8A\x05three\x88\x05\x03\xE8bye");
        sender.pong(Short::from_slice(b"four"));
        assert!(!sender.queue_control(Some([0; 8])).expect("nothing"));
        sender.sent(14);
        assert!(sender.has_closed());
    }

    #[test]
    fn the_rest_of_a_frame_is_what_was_not_sent() {
        let bufs = [IoSlice::new(b"abc"), IoSlice::new(b""), IoSlice::new(b"defgh")];
        let header = Header::encode(Opcode::Binary, 7, None);
        let whole = b"\x82\x07abcdefg";
        for done in 0..=whole.len() {
            let mut sender = Sender::new(false);
            sender.queue_rest(&header, &bufs, 7, done);
            assert_eq!(sender.queued(), &whole[done..], "after {done} bytes");
        }
    }

    #[test]
    fn clients_mask_with_ever_new_keys() {
        let mut sender = Sender::new(true);
        let mut keys = std::collections::HashSet::new();
        for _ in 0..100 {
            sender.queue_frame(Opcode::Binary, &[IoSlice::new(b"same")], 4).expect("queued");
            let frame = sender.queued().to_vec();
            assert_eq!(frame[..2], [0x82, 0x84]);
            let unmasked: Vec<u8> = (0..4).map(|at| frame[6 + at] ^ frame[2 + at]).collect();
            assert_eq!(unmasked, b"same");
            keys.insert(frame[2..6].to_vec());
            sender.sent(frame.len());
        }
        assert!(keys.len() > 95, "only {} keys of 100 differ", keys.len());
    }

    #[test]
    fn long_reasons_are_cut_between_characters() {
        let payload = close_payload(1000, &"ä".repeat(100));
        assert_eq!(payload.len(), 124);
        assert!(std::str::from_utf8(&payload[2..]).is_ok());
    }
}
