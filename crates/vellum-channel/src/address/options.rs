//! The options at the end of an address.

use super::part::Part;
use crate::error::Error;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

/// Options that one address may have.
const OPTIONS_MAX: usize = 64;
/// The longest time that can be told: 1 000 000 s, eleven days.
const MILLISECONDS_MAX: u64 = 1_000_000_000;

/// The options that were given. Whoever understands an option takes it; what is left at the end is not known.
pub(super) struct Options<'a> {
    given: Vec<Given<'a>>,
    known: Vec<&'static str>,
}

#[derive(Clone, Copy)]
struct Given<'a> {
    name: Part<'a>,
    value: Option<Part<'a>>,
}

impl<'a> Options<'a> {
    /// Reads `part`: nothing, or what stands after `?` (separated by `&`), or after `,` (by `,`) where `commas` may be.
    pub fn read(part: Part<'a>, commas: bool) -> Result<Self, Error> {
        let mut options = Self { given: Vec::new(), known: Vec::new() };
        let separator = match part.text().chars().next() {
            None => return Ok(options),
            Some('?') => '&',
            Some(',') if commas => ',',
            Some(_) => return Err(part.fail("the end, or options after ?")),
        };
        let mut rest = Some(part.skip(1)).filter(|rest| !rest.is_empty());
        while let Some(text) = rest {
            let (one, next) = match text.split_once(separator) {
                Some((one, next)) => (one, Some(next)),
                None => (text, None),
            };
            rest = next;
            let given = match one.split_once('=') {
                Some((name, value)) => Given { name, value: Some(value) },
                None => Given { name: one, value: None },
            };
            if given.name.is_empty() {
                return Err(one.fail("the name of an option"));
            }
            if options.given.len() == OPTIONS_MAX {
                return Err(one.fail(format_args!("no more than {OPTIONS_MAX} options")));
            }
            options.given.push(given);
        }
        Ok(options)
    }

    /// Says that all were taken. An option that is left is an error.
    pub fn finish(self) -> Result<(), Error> {
        match self.given.first() {
            None => Ok(()),
            Some(unknown) if self.known.is_empty() => {
                Err(unknown.name.fail("no option: an address of this kind has none"))
            }
            Some(unknown) => {
                Err(unknown.name.fail(format_args!("one of the options {}", self.known.join(", "))))
            }
        }
    }

    fn take_all(&mut self, name: &'static str) -> Vec<Given<'a>> {
        if !self.known.contains(&name) {
            self.known.push(name);
        }
        let (taken, left) = self.given.iter().partition(|given| is_named(given, name));
        self.given = left;
        taken
    }

    fn take(&mut self, name: &'static str) -> Result<Option<Given<'a>>, Error> {
        let all = self.take_all(name);
        match all.get(1) {
            Some(second) => Err(second.name.fail(format_args!("{name} only once"))),
            None => Ok(all.first().copied()),
        }
    }

    fn value(&mut self, name: &'static str) -> Result<Option<Part<'a>>, Error> {
        let given = self.take(name)?;
        given.map(|given| with_value(given, name)).transpose()
    }

    fn values(&mut self, name: &'static str) -> Result<Vec<Part<'a>>, Error> {
        self.take_all(name).into_iter().map(|given| with_value(given, name)).collect()
    }

    /// On or off; on if it stands alone.
    pub fn flag(&mut self, name: &'static str) -> Result<Option<bool>, Error> {
        Ok(self.placed_flag(name)?.map(|(is_on, _)| is_on))
    }

    /// The same, with where it was told.
    pub fn placed_flag(&mut self, name: &'static str) -> Result<Option<(bool, Part<'a>)>, Error> {
        let Some(given) = self.take(name)? else { return Ok(None) };
        match given.value.map(|value| value.text()) {
            None | Some("on" | "yes" | "true" | "1") => Ok(Some((true, given.name))),
            Some("off" | "no" | "false" | "0") => Ok(Some((false, given.name))),
            Some(_) => Err(given.value.unwrap_or(given.name).fail(format_args!("{name}=on or {name}=off"))),
        }
    }

    pub fn number(&mut self, name: &'static str, least: u64, most: u64) -> Result<Option<u64>, Error> {
        self.value(name)?.map(|value| value.number(name, least, most)).transpose()
    }

    /// The same for numbers of 32 bits.
    pub fn count(&mut self, name: &'static str, least: u32, most: u32) -> Result<Option<u32>, Error> {
        let number = self.number(name, least.into(), most.into())?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    /// File permissions.
    pub fn permissions(&mut self, name: &'static str) -> Result<Option<u32>, Error> {
        let Some(value) = self.value(name)? else { return Ok(None) };
        let text = value.text();
        let is_octal =
            (1..=5).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        let mode = if is_octal { u32::from_str_radix(text, 8).ok() } else { None };
        mode.filter(|mode| *mode <= 0o777)
            .map(Some)
            .ok_or_else(|| value.fail("octal permissions from 0 to 777, such as 660"))
    }

    /// A time in milliseconds, seconds (also with decimals) or minutes; more than nothing.
    pub fn time(&mut self, name: &'static str) -> Result<Option<Duration>, Error> {
        self.value(name)?.map(|value| time_of(value, name)).transpose()
    }

    /// The same, in whole seconds.
    pub fn seconds(&mut self, name: &'static str) -> Result<Option<Duration>, Error> {
        let Some(value) = self.value(name)? else { return Ok(None) };
        let time = time_of(value, name)?;
        if time.subsec_nanos() != 0 || time.as_secs() > 32767 {
            return Err(value.fail(format_args!("{name}, a time of 1 to 32767 whole seconds")));
        }
        Ok(Some(time))
    }

    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        self.value(name)?.map(|value| not_empty(value, name)?.decoded_text()).transpose()
    }

    pub fn texts(&mut self, name: &'static str) -> Result<Vec<String>, Error> {
        self.values(name)?.into_iter().map(|value| not_empty(value, name)?.decoded_text()).collect()
    }

    /// What was given under this name, as it stands.
    pub fn raw(&mut self, name: &'static str) -> Result<Option<Part<'a>>, Error> {
        self.value(name)
    }

    /// Texts that have to satisfy `is_good`; `expected` says what that is.
    pub fn checked_texts(
        &mut self,
        name: &'static str,
        is_good: impl Fn(&str) -> bool,
        expected: &str,
    ) -> Result<Vec<String>, Error> {
        let check = |value: Part<'a>| {
            let text = value.decoded_text()?;
            if text.is_empty() || !is_good(&text) { Err(value.fail(expected)) } else { Ok(text) }
        };
        self.values(name)?.into_iter().map(check).collect()
    }

    /// The same for one.
    pub fn checked_text(
        &mut self,
        name: &'static str,
        is_good: impl Fn(&str) -> bool,
        expected: &str,
    ) -> Result<Option<String>, Error> {
        let Some(value) = self.value(name)? else { return Ok(None) };
        let text = value.decoded_text()?;
        if text.is_empty() || !is_good(&text) { Err(value.fail(expected)) } else { Ok(Some(text)) }
    }

    pub fn path(&mut self, name: &'static str) -> Result<Option<PathBuf>, Error> {
        self.value(name)?.map(|value| path_of(not_empty(value, name)?)).transpose()
    }

    pub fn paths(&mut self, name: &'static str) -> Result<Vec<PathBuf>, Error> {
        self.values(name)?.into_iter().map(|value| path_of(not_empty(value, name)?)).collect()
    }
}

/// Whether it is that option, also as QEMU writes it.
fn is_named(given: &Given<'_>, name: &str) -> bool {
    let text = given.name.text();
    match text.strip_prefix("keep-alive") {
        Some(rest) => name.strip_prefix("keepalive") == Some(rest),
        None => text == name,
    }
}

fn with_value<'a>(given: Given<'a>, name: &str) -> Result<Part<'a>, Error> {
    given.value.ok_or_else(|| given.name.fail(format_args!("{name}= with a value")))
}

fn not_empty<'a>(value: Part<'a>, name: &str) -> Result<Part<'a>, Error> {
    if value.is_empty() {
        return Err(value.fail(format_args!("a value for {name}")));
    }
    Ok(value)
}

/// The path that `part` writes.
pub(super) fn path_of(part: Part<'_>) -> Result<PathBuf, Error> {
    Ok(PathBuf::from(OsString::from_vec(part.decoded()?)))
}

fn time_of(value: Part<'_>, name: &str) -> Result<Duration, Error> {
    let wrong = || {
        let most = MILLISECONDS_MAX / 1000;
        value.fail(format_args!("{name}, a time up to {most} s such as 5, 1.5s, 500ms or 2m"))
    };
    let text = value.text();
    let (digits, unit) =
        text.split_at(text.find(|found: char| !found.is_ascii_digit() && found != '.').unwrap_or(text.len()));
    let per_unit = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        _ => return Err(wrong()),
    };
    let (whole, decimals) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_good = |text: &str, most| {
        !text.is_empty() && text.len() <= most && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    // Parts of a millisecond are not told.
    if !is_good(whole, 10) || !is_good(decimals, 3) || (per_unit == 1 && digits.contains('.')) {
        return Err(wrong());
    }
    let thousandths = format!("{decimals:0<3}").parse::<u64>().map_err(|_| wrong())?;
    let whole = whole.parse::<u64>().map_err(|_| wrong())?;
    // In range: `whole` has at most ten digits.
    let milliseconds = whole * per_unit + thousandths * per_unit / 1000;
    if milliseconds == 0 || milliseconds > MILLISECONDS_MAX {
        return Err(wrong());
    }
    Ok(Duration::from_millis(milliseconds))
}
