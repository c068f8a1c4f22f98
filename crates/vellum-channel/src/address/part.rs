//! A part of an address's text that knows where it stands, for errors.

use crate::error::{Error, ErrorKind};
use percent_encoding::percent_decode_str;

/// Bytes of the text that an error shows.
const SHOWN: usize = 100;

/// A part of the text.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    whole: &'a str,
    from: usize,
    to: usize,
}

impl<'a> Part<'a> {
    pub fn whole(text: &'a str) -> Self {
        Self { whole: text, from: 0, to: text.len() }
    }

    pub fn text(&self) -> &'a str {
        self.whole.get(self.from..self.to).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.from == self.to
    }

    /// Both sides of the byte at `middle`, which must be a boundary of characters, as what `find` tells is.
    pub fn split_at(self, middle: usize) -> (Self, Self) {
        let middle = self.from.saturating_add(middle).min(self.to);
        (Self { to: middle, ..self }, Self { from: middle, ..self })
    }

    /// Without its first `count` bytes.
    pub fn skip(self, count: usize) -> Self {
        self.split_at(count).1
    }

    pub fn strip(self, prefix: &str) -> Option<Self> {
        self.text().starts_with(prefix).then(|| self.skip(prefix.len()))
    }

    /// The parts before and after the first `separator`.
    pub fn split_once(self, separator: char) -> Option<(Self, Self)> {
        let (before, after) = self.split_at(self.text().find(separator)?);
        Some((before, after.skip(separator.len_utf8())))
    }

    /// The part before the first of `ends`, and the rest from it on.
    pub fn until(self, ends: &[char]) -> (Self, Self) {
        let end = self.text().find(|found| ends.contains(&found)).unwrap_or(self.text().len());
        self.split_at(end)
    }

    /// An error at the start of this part.
    pub fn fail(&self, expected: impl std::fmt::Display) -> Error {
        let found = match self.text() {
            "" => String::new(),
            text => format!(", found \"{}\"", shortened(text)),
        };
        let at = match self.from {
            end if end == self.whole.len() => "its end".to_owned(),
            from => format!("byte {from}"),
        };
        Error::new(
            ErrorKind::AddressSyntax,
            format!(
                "cannot read the address \"{}\": at {at}: expected {expected}{found}",
                shortened(self.whole)
            ),
        )
    }

    /// The bytes that are meant, with every `%XX` replaced.
    pub fn decoded(&self) -> Result<Vec<u8>, Error> {
        let mut rest = *self;
        while let Some(at) = rest.text().find('%') {
            let sequence = rest.skip(at);
            let digits = sequence.text().as_bytes().get(1..3);
            if !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
                return Err(sequence.fail("two hexadecimal digits after % (a % itself is written %25)"));
            }
            rest = sequence.skip(3);
        }
        let bytes: Vec<u8> = percent_decode_str(self.text()).collect();
        if bytes.contains(&0) {
            return Err(self.fail("text without a zero byte"));
        }
        Ok(bytes)
    }

    /// The same, of text.
    pub fn decoded_text(&self) -> Result<String, Error> {
        String::from_utf8(self.decoded()?).map_err(|_| self.fail("text in UTF-8"))
    }

    /// A decimal number from `least` to `most`: digits alone.
    pub fn number(&self, what: &str, least: u64, most: u64) -> Result<u64, Error> {
        let text = self.text();
        let is_plain = !text.is_empty() && text.len() <= 20 && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = if is_plain { text.parse::<u64>().ok() } else { None };
        number
            .filter(|number| (least..=most).contains(number))
            .ok_or_else(|| self.fail(format_args!("{what}, a number from {least} to {most}")))
    }
}

fn shortened(text: &str) -> String {
    let mut end = SHOWN.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let shown = text.get(..end).unwrap_or_default().escape_debug();
    if end < text.len() { format!("{shown}...") } else { shown.to_string() }
}
