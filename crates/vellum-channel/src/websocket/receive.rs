//! What comes in: from bytes to payload and control frames. It does no I/O.

use super::frame::{Header, Mask, Opcode, Violation, status};
use crate::error::ErrorKind;
use crate::stream::scatter;
use smallvec::SmallVec;
use std::io::IoSliceMut;

/// Bytes read ahead of the user: the opening handshake, headers, control frames, small messages.
pub(super) const AHEAD: usize = 8 << 10;
/// Payload of at least this is read to where the user wants it, without passing through the buffer.
const DIRECT_MIN: u64 = 4 << 10;
/// Frames without payload that one message may have: they cost work and bring nothing.
const EMPTY_FRAGMENTS_MAX: u32 = 1024;

/// The payload of a control frame.
pub(super) type Short = SmallVec<[u8; 128]>;

/// What is accepted from the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub message: u64,
    pub frame: u64,
    /// Whether frames have to be masked: those of clients.
    pub is_masked: bool,
}

/// What is next in the input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing before more bytes come in.
    Starved,
    /// Payload of a data frame, at least one byte.
    Payload,
    Ping(Short),
    Pong(Short),
    Close(Short),
}

#[derive(Debug)]
pub(super) struct Receiver {
    limits: Limits,
    /// What came in and is not yet used: `ahead[start..end]`.
    ahead: Vec<u8>,
    start: usize,
    end: usize,
    /// The data frame that is being read, until the last byte of its payload.
    frame: Option<Frame>,
    is_in_message: bool,
    /// Bytes that the frames of this message announced so far.
    message: u64,
    empty_fragments: u32,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    left: u64,
    mask: Option<Mask>,
}

impl Receiver {
    /// Goes on behind the opening handshake: with `ahead[start..end]`.
    pub fn new(limits: Limits, mut ahead: Vec<u8>, start: usize, end: usize) -> Self {
        ahead.resize(AHEAD.max(end), 0);
        let (is_in_message, message, empty_fragments) = (false, 0, 0);
        Self { limits, ahead, start, end, frame: None, is_in_message, message, empty_fragments }
    }

    /// What came in and was not used.
    pub fn unused(&self) -> &[u8] {
        &self.ahead[self.start..self.end]
    }

    /// Room for more input. There is always some: no control frame or header fills the buffer.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.ahead.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.ahead[self.end..]
    }

    /// So many bytes were put into [`room`](Receiver::room).
    pub fn filled(&mut self, count: usize) {
        self.end += count;
    }

    /// Drops what came in: nobody will read it.
    pub fn discard(&mut self) {
        self.start = 0;
        self.end = 0;
    }

    /// Drops the payload that is there.
    pub fn skip(&mut self) {
        let Some(frame) = &mut self.frame else { return };
        let there = (self.end - self.start) as u64;
        // Not more than is there.
        let part = frame.left.min(there) as usize;
        frame.pass(part);
        self.start += part;
        self.end_frame();
    }

    /// Moves on to the next payload or control frame.
    pub fn step(&mut self) -> Result<Step, Violation> {
        loop {
            let input = &self.ahead[self.start..self.end];
            if self.frame.is_some() {
                return Ok(if input.is_empty() { Step::Starved } else { Step::Payload });
            }
            let Some(header) = Header::decode(input, self.limits.is_masked)? else {
                return Ok(Step::Starved);
            };
            if !header.opcode.is_control() {
                self.begin(header)?;
                self.start += header.size;
                continue;
            }
            // At most 125 bytes: checked with the header.
            let end = header.size + header.len as usize;
            let Some(payload) = input.get(header.size..end) else { return Ok(Step::Starved) };
            let mut payload = Short::from_slice(payload);
            if let Some(mut mask) = header.mask {
                mask.apply(&mut payload);
            }
            self.start += end;
            return Ok(match header.opcode {
                Opcode::Ping => Step::Ping(payload),
                Opcode::Pong => Step::Pong(payload),
                _ => Step::Close(payload),
            });
        }
    }

    /// A data frame begins.
    fn begin(&mut self, header: Header) -> Result<(), Violation> {
        match (header.opcode, self.is_in_message) {
            (Opcode::Text, _) => {
                return Err(Violation {
                    code: status::UNSUPPORTED_DATA,
                    kind: ErrorKind::WebSocketProtocol,
                    what: "sent text where only binary messages are taken".into(),
                });
            }
            (Opcode::Binary, true) => {
                return Err(Violation::protocol("began a message before the last one was complete"));
            }
            (Opcode::Continuation, false) => {
                return Err(Violation::protocol("continued a message that it had not begun"));
            }
            _ => {}
        }
        if !self.is_in_message {
            self.message = 0;
            self.empty_fragments = 0;
        }
        self.message = self.message.saturating_add(header.len);
        if header.len > self.limits.frame || self.message > self.limits.message {
            return Err(Violation::limit(
                status::TOO_BIG,
                format!(
                    "sent a frame of {} bytes in a message of at least {}, where a frame may have {} and a message {}",
                    header.len, self.message, self.limits.frame, self.limits.message
                ),
            ));
        }
        if header.len == 0 && !header.is_final {
            self.empty_fragments += 1;
            if self.empty_fragments > EMPTY_FRAGMENTS_MAX {
                let what = format!("sent more than {EMPTY_FRAGMENTS_MAX} empty fragments of one message");
                return Err(Violation::limit(status::POLICY, what));
            }
        }
        self.is_in_message = !header.is_final;
        if header.len > 0 {
            self.frame = Some(Frame { left: header.len, mask: header.mask });
        }
        Ok(())
    }

    /// Whether payload of a frame that has begun is still to come, or to be taken.
    pub fn is_in_frame(&self) -> bool {
        self.frame.is_some()
    }

    /// Copies payload into `bufs`, behind the first `skip` bytes of them: what is there of this frame.
    pub fn take(&mut self, bufs: &mut [IoSliceMut<'_>], skip: usize) -> usize {
        let copied = self.peek(bufs, skip);
        self.start += copied;
        if let Some(frame) = &mut self.frame {
            frame.pass(copied);
        }
        self.end_frame();
        copied
    }

    /// The same, leaving it where it is.
    pub fn peek(&self, bufs: &mut [IoSliceMut<'_>], skip: usize) -> usize {
        let Some(frame) = self.frame else { return 0 };
        let input = self.unused();
        let there = usize::try_from(frame.left).map_or(input.len(), |left| left.min(input.len()));
        let mut window = window(bufs, skip, there);
        let copied = scatter(&input[..there], &mut window);
        frame.unmask(&mut window, copied);
        copied
    }

    /// How much of the payload may be read right to the user, who has `room` bytes for it; `None` when it is too little
    /// or some of it waits in the buffer.
    pub fn direct(&self, room: usize) -> Option<usize> {
        let frame = self.frame.filter(|_| self.start == self.end)?;
        let part = frame.left.min(room as u64);
        (part >= DIRECT_MIN).then_some(part as usize)
    }

    /// The first `count` bytes in `bufs` are payload, as it came.
    pub fn pass_direct(&mut self, bufs: &mut [IoSliceMut<'_>], count: usize) {
        if let Some(frame) = &mut self.frame {
            frame.unmask(bufs, count);
            frame.pass(count);
        }
        self.end_frame();
    }

    fn end_frame(&mut self) {
        if self.frame.is_some_and(|frame| frame.left == 0) {
            self.frame = None;
        }
    }
}

impl Frame {
    /// Unmasks the first `count` bytes in `bufs`, which come next in the payload.
    fn unmask(&self, bufs: &mut [IoSliceMut<'_>], mut count: usize) {
        let Some(mut mask) = self.mask else { return };
        for buf in bufs {
            let part = count.min(buf.len());
            mask.apply(&mut buf[..part]);
            count -= part;
        }
    }

    /// Moves on in the payload.
    fn pass(&mut self, count: usize) {
        self.left = self.left.saturating_sub(count as u64);
        if let Some(mask) = &mut self.mask {
            mask.pass(count);
        }
    }
}

/// The part of `bufs` behind `skip` bytes and of at most `count` bytes.
pub(super) fn window<'a>(
    bufs: &'a mut [IoSliceMut<'_>],
    mut skip: usize,
    mut count: usize,
) -> SmallVec<[IoSliceMut<'a>; 16]> {
    let mut window = SmallVec::new();
    for buf in bufs {
        let from = skip.min(buf.len());
        skip -= from;
        let part = count.min(buf.len() - from);
        if part > 0 {
            window.push(IoSliceMut::new(&mut buf[from..from + part]));
        }
        count -= part;
        if count == 0 {
            break;
        }
    }
    window
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { message: 1000, frame: 600, is_masked: false };

    fn receiver(limits: Limits) -> Receiver {
        Receiver::new(limits, Vec::new(), 0, 0)
    }

    fn feed(receiver: &mut Receiver, bytes: &[u8]) {
        receiver.room()[..bytes.len()].copy_from_slice(bytes);
        receiver.filled(bytes.len());
    }

    #[test]
    fn fragments_and_control_frames_between_them() {
        let mut receiver = receiver(LIMITS);
        feed(&mut receiver, &[0x02, 2, b'a', b'b', 0x89, 1, b'!', 0x80, 1, b'c', 0x82, 0]);
        let mut buf = [0; 8];
        assert_eq!(receiver.step().expect("payload"), Step::Payload);
        assert_eq!(receiver.peek(&mut [IoSliceMut::new(&mut buf)], 0), 2);
        assert_eq!(receiver.take(&mut [IoSliceMut::new(&mut buf)], 0), 2);
        assert_eq!(receiver.step().expect("ping"), Step::Ping(Short::from_slice(b"!")));
        assert_eq!(receiver.step().expect("payload"), Step::Payload);
        assert_eq!(receiver.take(&mut [IoSliceMut::new(&mut buf)], 2), 1);
        assert_eq!(&buf[..3], b"abc");
        assert_eq!(receiver.step().expect("an empty message is nothing"), Step::Starved);
    }

    #[test]
    fn limits_hold() {
        let mut one = receiver(LIMITS);
        feed(&mut one, &[0x82, 126, 0x02, 0x59]);
        assert_eq!(one.step().expect_err("601 bytes").code, 1009);

        let mut many = receiver(LIMITS);
        feed(&mut many, &[0x02, 126, 0x02, 0x58]);
        assert_eq!(many.step().expect("600 bytes are taken"), Step::Starved);
        many.pass_direct(&mut [], 600);
        feed(&mut many, &[0x80, 126, 0x01, 0x91]);
        assert_eq!(many.step().expect_err("1001 bytes").code, 1009);

        let mut empty = receiver(LIMITS);
        feed(&mut empty, &[0x02, 0]);
        for _ in 1..EMPTY_FRAGMENTS_MAX {
            feed(&mut empty, &[0x00, 0]);
            assert_eq!(empty.step().expect("within the limit"), Step::Starved);
        }
        feed(&mut empty, &[0x00, 0]);
        assert_eq!(empty.step().expect_err("one too many").code, 1008);
    }

    #[test]
    fn payload_is_unmasked_across_slices_and_calls() {
        let mut receiver = receiver(Limits { is_masked: true, ..LIMITS });
        let mut mask = Mask([9, 8, 7, 6]);
        let mut payload = *b"thirteen bits";
        mask.apply(&mut payload);
        feed(&mut receiver, &[0x82, 0x80 | 13, 9, 8, 7, 6]);
        feed(&mut receiver, &payload);
        let (mut first, mut second) = ([0; 3], [0; 4]);
        assert_eq!(receiver.step().expect("payload"), Step::Payload);
        let mut bufs = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        assert_eq!(receiver.take(&mut bufs, 0), 7);
        assert_eq!((&first, &second), (b"thi", b"rtee"));
        let mut rest = [0; 9];
        assert_eq!(receiver.take(&mut [IoSliceMut::new(&mut rest)], 0), 6);
        assert_eq!(&rest[..6], b"n bits");
    }

    #[test]
    fn only_large_payload_goes_direct() {
        let mut receiver = receiver(Limits { message: 1 << 20, frame: 1 << 20, is_masked: false });
        feed(&mut receiver, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(receiver.direct(1 << 20), None, "no frame yet");
        assert_eq!(receiver.step().expect("a header"), Step::Starved);
        assert_eq!(receiver.direct(100), None);
        assert_eq!(receiver.direct(5000), Some(5000));
        assert_eq!(receiver.direct(1 << 20), Some(65536));
        feed(&mut receiver, &[1]);
        assert_eq!(receiver.direct(1 << 20), None, "a byte of it is in the buffer");
    }
}
