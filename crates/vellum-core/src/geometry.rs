//! CHS geometry rules (format sheet `geometry.md`).

use crate::Chs;

/// PCHS for ATA (section 4): a plausible stored geometry, else 16 heads and 63 sectors, at most 16383 cylinders.
pub fn pchs(sectors: u64, stored: Option<Chs>) -> Chs {
    if let Some(chs) = stored
        && (1..=16).contains(&chs.heads)
        && (1..=63).contains(&chs.sectors)
        && chs.cylinders != 0
        && u64::from(chs.cylinders).saturating_mul(u64::from(chs.heads) * u64::from(chs.sectors)) <= sectors
    {
        return chs;
    }
    Chs { cylinders: clamp(sectors / 1008, 1, 16383), heads: 16, sectors: 63 }
}

/// LCHS for the BIOS (section 5, rules 1, 3 and 4).
pub fn lchs(sectors: u64, stored: Option<Chs>) -> Chs {
    if let Some(chs) = stored
        && chs.cylinders != 0
        && (1..=255).contains(&chs.heads)
        && (1..=63).contains(&chs.sectors)
    {
        let cylinders = clamp(sectors / u64::from(chs.heads) / u64::from(chs.sectors), 1, 1024);
        return Chs { cylinders, ..chs };
    }
    let physical = pchs(sectors, None);
    if physical.cylinders <= 1024 {
        return physical;
    }
    let heads =
        [16u32, 32, 64, 128].into_iter().find(|h| sectors / u64::from(*h) / 63 <= 1024).unwrap_or(255);
    Chs { cylinders: clamp(sectors / u64::from(heads) / 63, 1, 1024), heads, sectors: 63 }
}

/// The geometry of a VHD footer (section 2).
pub fn vhd(sectors: u64) -> Chs {
    let t = sectors.min(65535 * 16 * 255);
    let (spt, heads, ch) = if t >= 65535 * 16 * 63 {
        (255, 16, t / 255)
    } else {
        let (mut spt, mut ch) = (17, t / 17);
        let mut heads = ch.div_ceil(1024).max(4);
        if ch >= heads * 1024 || heads > 16 {
            (spt, heads, ch) = (31, 16, t / 31);
        }
        if ch >= heads * 1024 {
            (spt, heads, ch) = (63, 16, t / 63);
        }
        (spt, heads, ch)
    };
    Chs { cylinders: clamp(ch / heads, 0, 65535), heads: heads as u32, sectors: spt }
}

fn clamp(value: u64, min: u32, max: u32) -> u32 {
    u32::try_from(value).unwrap_or(max).clamp(min, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chs(cylinders: u32, heads: u32, sectors: u32) -> Chs {
        Chs { cylinders, heads, sectors }
    }

    #[test]
    fn vhd_table_of_the_sheet() {
        for (sectors, expected) in [
            (6144, chs(90, 4, 17)),
            (40960, chs(602, 4, 17)),
            (204800, chs(1003, 12, 17)),
            (409600, chs(825, 16, 31)),
            (524288, chs(520, 16, 63)),
            (1024000, chs(1015, 16, 63)),
            (1032192, chs(1024, 16, 63)),
            (20971520, chs(20805, 16, 63)),
            (66058240, chs(65533, 16, 63)),
            (66060288, chs(16191, 16, 255)),
            (266338304, chs(65278, 16, 255)),
            (1 << 40, chs(65535, 16, 255)),
        ] {
            assert_eq!(vhd(sectors), expected, "{sectors}");
        }
    }

    #[test]
    fn worked_examples_of_the_sheet() {
        assert_eq!(pchs(41943040, None), chs(16383, 16, 63));
        assert_eq!(lchs(41943040, None), chs(1024, 255, 63));
        assert_eq!(lchs(1024000, None), chs(1015, 16, 63));
        assert_eq!(lchs(16777216, None), chs(1024, 255, 63));
    }
}
