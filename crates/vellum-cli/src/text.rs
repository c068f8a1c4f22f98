//! Sizes and durations for people; text from images made safe for a terminal.

use std::time::Duration;

const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A number of bytes in binary units: `10 GiB`, `1.50 MiB`, `512 bytes`.
pub fn size(bytes: u64) -> String {
    let mut unit = "";
    let mut whole = bytes;
    let mut rest = 0;
    for next in UNITS {
        if whole < 1024 {
            break;
        }
        // The fraction in 1/1024; what is smaller shows at most as the difference between exact and rounded.
        rest = (whole % 1024) | u64::from(rest != 0);
        whole /= 1024;
        unit = next;
    }
    match (unit, whole, rest) {
        ("", 1, _) => "1 byte".to_owned(),
        ("", ..) => format!("{whole} bytes"),
        (_, _, 0) => format!("{whole} {unit}"),
        // Cut, not rounded: 1023.99 MiB is not 1024 MiB.
        _ => format!("{whole}.{:02} {unit}", rest * 100 / 1024),
    }
}

/// A number of bytes in binary units with the exact number beside it.
pub fn exact_size(bytes: u64) -> String {
    if bytes < 1024 { size(bytes) } else { format!("{} ({bytes} bytes)", size(bytes)) }
}

/// Bytes a second.
pub fn rate(bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let per_second = if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
    // Whole units of rates are enough; `as` saturates.
    let per_second = per_second as u64;
    let step = per_second.checked_ilog2().map_or(0, |log| (log / 10).min(6));
    let unit = match step.checked_sub(1).and_then(|index| UNITS.get(index as usize)) {
        Some(unit) => unit,
        None => "bytes",
    };
    format!("{} {unit}/s", per_second >> (10 * step))
}

/// `0:07`, `12:34`, `1:02:03`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// Time that something took: `0.12 s`, `59.98 s`, then as [`duration`].
pub fn time_taken(time: Duration) -> String {
    let (seconds, hundredths) = (time.as_secs(), time.subsec_millis() / 10);
    if seconds < 60 { format!("{seconds}.{hundredths:02} s") } else { duration(time) }
}

/// Seconds since 1970 as a date and time in UTC: `2026-11-20 17:05:00`.
pub fn date(unix: u64) -> String {
    let (days, seconds) = (unix / 86_400, unix % 86_400);
    // Days since 0000-03-01, in eras of 400 years: leap days stand at the end of a year then.
    let days = days.saturating_add(719_468);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// Text that came from an image, with everything escaped that could act on a terminal or reorder what is shown.
pub fn clean(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        let acts = c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if acts {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_never_rounded_up() {
        for (bytes, shown) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (1 << 20, "1 MiB"),
            ((1 << 30) - 1, "1023.99 MiB"),
            ((1 << 30) + 1, "1.00 GiB"),
            (10 << 30, "10 GiB"),
            (64 << 40, "64 TiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(size(bytes), shown, "{bytes}");
        }
        assert_eq!(exact_size(10 << 30), "10 GiB (10737418240 bytes)");
        assert_eq!(exact_size(512), "512 bytes");
    }

    #[test]
    fn rates_and_durations() {
        assert_eq!(rate(300 << 20, Duration::from_secs(2)), "150 MiB/s");
        assert_eq!(rate(5, Duration::ZERO), "0 bytes/s");
        assert_eq!(rate(u64::MAX, Duration::from_nanos(1)), "15 EiB/s");
        assert_eq!(duration(Duration::from_secs(7)), "0:07");
        assert_eq!(duration(Duration::from_secs(3723)), "1:02:03");
        assert_eq!(time_taken(Duration::from_millis(3059)), "3.05 s");
        assert_eq!(time_taken(Duration::from_secs(75)), "1:15");
    }

    #[test]
    fn dates() {
        for (unix, shown) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_200, "2024-03-01 00:00:00"),
            (4_107_542_399, "2100-02-28 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (1_767_225_599, "2025-12-31 23:59:59"),
        ] {
            assert_eq!(date(unix), shown);
        }
        assert!(!date(u64::MAX).is_empty());
    }

    #[test]
    fn text_from_images_cannot_act_on_the_terminal() {
        assert_eq!(clean("a\x1b[31m\nb\u{9b}\u{202e}"), "a\\u{1b}[31m\\nb\\u{9b}\\u{202e}");
        assert_eq!(clean("Größe 磁盘"), "Größe 磁盘");
    }
}
