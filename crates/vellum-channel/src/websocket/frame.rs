//! Frame headers and masking (RFC 6455, section 5.2).

use crate::error::ErrorKind;

/// The longest header: two bytes, a length of eight, a mask of four.
pub(super) const HEADER_MAX: usize = 14;
/// The longest payload of a control frame.
pub(super) const CONTROL_MAX: usize = 125;

/// Status codes of close frames.
pub(super) mod status {
    pub(crate) const NORMAL: u16 = 1000;
    pub(crate) const GOING_AWAY: u16 = 1001;
    pub(crate) const PROTOCOL_ERROR: u16 = 1002;
    pub(crate) const UNSUPPORTED_DATA: u16 = 1003;
    pub(crate) const BAD_DATA: u16 = 1007;
    pub(crate) const POLICY: u16 = 1008;
    pub(crate) const TOO_BIG: u16 = 1009;
}

/// Whether a close frame may carry this status code: one of the standard's that are meant to be sent, or of a library
/// or application.
pub(super) fn may_be_sent(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

/// What the peer did wrong, and the status code that it is told.
#[derive(Clone, Debug)]
pub(super) struct Violation {
    pub code: u16,
    pub kind: ErrorKind,
    /// Completes "the peer ...".
    pub what: String,
}

impl Violation {
    pub fn protocol(what: impl Into<String>) -> Self {
        Self { code: status::PROTOCOL_ERROR, kind: ErrorKind::WebSocketProtocol, what: what.into() }
    }

    pub fn limit(code: u16, what: impl Into<String>) -> Self {
        Self { code, kind: ErrorKind::Limit, what: what.into() }
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Opcode {
    fn from_bits(bits: u8) -> Option<Self> {
        let all = [Self::Continuation, Self::Text, Self::Binary, Self::Close, Self::Ping, Self::Pong];
        all.into_iter().find(|one| *one as u8 == bits)
    }

    pub fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub is_final: bool,
    pub opcode: Opcode,
    /// Bytes of payload.
    pub len: u64,
    pub mask: Option<Mask>,
    /// Bytes of the header itself.
    pub size: usize,
}

impl Header {
    /// Reads the header at the start of `input`; `None` while bytes of it are missing. What is wrong with it is told
    /// by the first byte that shows it.
    pub fn decode(input: &[u8], must_be_masked: bool) -> Result<Option<Self>, Violation> {
        let Some(&first) = input.first() else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err(Violation::protocol(
                "set reserved bits of a frame, which no extension was agreed for",
            ));
        }
        let is_final = first & 0x80 != 0;
        let Some(opcode) = Opcode::from_bits(first & 0x0F) else {
            return Err(Violation::protocol(format!("sent a frame of the reserved type {}", first & 0x0F)));
        };
        if opcode.is_control() && !is_final {
            return Err(Violation::protocol("sent a control frame in fragments"));
        }
        let Some(&second) = input.get(1) else { return Ok(None) };
        let is_masked = second & 0x80 != 0;
        if is_masked != must_be_masked {
            let what =
                if is_masked { "is the server and masked a frame" } else { "sent a frame without a mask" };
            return Err(Violation::protocol(what));
        }
        let short = second & 0x7F;
        if opcode.is_control() && usize::from(short) > CONTROL_MAX {
            return Err(Violation::protocol("sent a control frame of more than 125 bytes"));
        }
        let Some((len, len_end)) = decode_len(input, short)? else { return Ok(None) };
        if !is_masked {
            return Ok(Some(Self { is_final, opcode, len, mask: None, size: len_end }));
        }
        let Some(key) = input.get(len_end..).and_then(<[u8]>::first_chunk) else { return Ok(None) };
        Ok(Some(Self { is_final, opcode, len, mask: Some(Mask(*key)), size: len_end + key.len() }))
    }

    /// Appends the header of a frame that is the whole message.
    pub fn encode(opcode: Opcode, len: usize, mask: Option<Mask>) -> Encoded {
        let mut encoded = Encoded { bytes: [0; HEADER_MAX], len: 0 };
        encoded.push(&[0x80 | opcode as u8]);
        let masked = if mask.is_some() { 0x80 } else { 0 };
        match (u8::try_from(len), u16::try_from(len)) {
            (Ok(short @ 0..=125), _) => encoded.push(&[masked | short]),
            (_, Ok(medium)) => {
                encoded.push(&[masked | 126]);
                encoded.push(&medium.to_be_bytes());
            }
            _ => {
                encoded.push(&[masked | 127]);
                encoded.push(&(len as u64).to_be_bytes());
            }
        }
        if let Some(Mask(key)) = mask {
            encoded.push(&key);
        }
        encoded
    }
}

/// The length of the payload, and where the header goes on after it.
fn decode_len(input: &[u8], short: u8) -> Result<Option<(u64, usize)>, Violation> {
    let rest = &input[2..];
    let (len, end, least) = match short {
        126 => match rest.first_chunk() {
            Some(bytes) => (u64::from(u16::from_be_bytes(*bytes)), 4, 126),
            None => return Ok(None),
        },
        127 => match (rest.first(), rest.first_chunk()) {
            (Some(0x80..), _) => {
                return Err(Violation::protocol("announced a frame of 2^63 bytes or more"));
            }
            (_, Some(bytes)) => (u64::from_be_bytes(*bytes), 10, 0x1_0000),
            _ => return Ok(None),
        },
        short => (u64::from(short), 2, 0),
    };
    if len < least {
        return Err(Violation::protocol(format!("wrote the frame length {len} longer than it has to be")));
    }
    Ok(Some((len, end)))
}

/// An encoded header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoded {
    bytes: [u8; HEADER_MAX],
    len: usize,
}

impl Encoded {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The four bytes that a client's payload is combined with, turned to the next byte's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mask(pub [u8; 4]);

impl Mask {
    /// The bytes for one word of payload.
    fn wide(self) -> u64 {
        let [a, b, c, d] = self.0;
        u64::from_ne_bytes([a, b, c, d, a, b, c, d])
    }

    /// Moves on in the payload.
    pub fn pass(&mut self, count: usize) {
        self.0.rotate_left(count % 4);
    }

    /// Masks or unmasks the next bytes of the payload where they are.
    pub fn apply(&mut self, bytes: &mut [u8]) {
        let wide = self.wide();
        // In words, which the compiler makes vectors of.
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
        }
        for (byte, key) in rest.iter_mut().zip(self.0.iter().cycle()) {
            *byte ^= key;
        }
        self.pass(bytes.len());
    }

    /// Masks or unmasks the next bytes of the payload on their way from `from` to `to`, which is as long.
    pub fn copy(&mut self, from: &[u8], to: &mut [u8]) {
        let wide = self.wide();
        let (from_words, from_rest) = from.as_chunks::<8>();
        let (to_words, to_rest) = to.as_chunks_mut::<8>();
        for (to, from) in to_words.iter_mut().zip(from_words) {
            *to = (u64::from_ne_bytes(*from) ^ wide).to_ne_bytes();
        }
        for ((to, from), key) in to_rest.iter_mut().zip(from_rest).zip(self.0.iter().cycle()) {
            *to = from ^ key;
        }
        self.pass(from.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Option<Header> {
        Header::decode(bytes, false).expect("a good header")
    }

    #[test]
    fn every_length_class_comes_back_and_is_as_short_as_can_be() {
        for (len, size) in [
            (0, 2),
            (1, 2),
            (125, 2),
            (126, 4),
            (127, 4),
            (65535, 4),
            (65536, 10),
            (1 << 20, 10),
            (1 << 40, 10),
        ] {
            let plain = Header::encode(Opcode::Binary, len, None);
            assert_eq!(plain.as_bytes().len(), size);
            for cut in 0..size {
                assert!(decode(&plain.as_bytes()[..cut]).is_none(), "{cut} of {size} bytes are not all");
            }
            let header = decode(plain.as_bytes()).expect("all bytes are there");
            assert_eq!((header.len, header.size, header.mask), (len as u64, size, None));
            assert!(header.is_final && header.opcode == Opcode::Binary);

            let masked = Header::encode(Opcode::Binary, len, Some(Mask([1, 2, 3, 4])));
            let header = Header::decode(masked.as_bytes(), true).expect("good").expect("complete");
            assert_eq!((header.len, header.size), (len as u64, size + 4));
            assert_eq!(header.mask, Some(Mask([1, 2, 3, 4])));
        }
    }

    #[test]
    fn bad_headers_are_refused_by_their_first_bad_byte() {
        let cases: [(&[u8], bool, &str); 10] = [
            (&[0xC2], false, "reserved bits"),
            (&[0xA2], false, "reserved bits"),
            (&[0x83], false, "reserved type 3"),
            (&[0x8B], false, "reserved type 11"),
            (&[0x09], false, "in fragments"),
            (&[0x82, 0x05], true, "without a mask"),
            (&[0x82, 0x85], false, "masked"),
            (&[0x89, 126], false, "more than 125"),
            (&[0x82, 126, 0, 125], false, "longer than"),
            (&[0x82, 127, 0x80], false, "2^63"),
        ];
        for (bytes, must_be_masked, part) in cases {
            let violation = Header::decode(bytes, must_be_masked).expect_err(part);
            assert!(violation.what.contains(part), "{} should tell {part}", violation.what);
            assert_eq!(violation.code, 1002);
            let before = &bytes[..bytes.len() - 1];
            assert!(Header::decode(before, must_be_masked).expect(part).is_none());
        }
    }

    #[test]
    fn masking_goes_on_where_it_stopped() {
        let data: Vec<u8> = (0..1000_u32).map(|at| (at * 7) as u8).collect();
        let key = [0x12, 0x34, 0x56, 0x78];
        let expected: Vec<u8> = data.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
        for step in 1..40 {
            let mut masked = data.clone();
            let mut mask = Mask(key);
            masked.chunks_mut(step).for_each(|part| mask.apply(part));
            assert_eq!(masked, expected, "in steps of {step}");

            let (mut mask, mut copied) = (Mask(key), vec![0; data.len()]);
            for (from, to) in data.chunks(step).zip(copied.chunks_mut(step)) {
                mask.copy(from, to);
            }
            assert_eq!(copied, expected, "copied in steps of {step}");
        }
    }
}
