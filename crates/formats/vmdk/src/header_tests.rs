use super::*;

/// The header of the sheet's section 11.
pub(crate) fn worked_example() -> SparseExtentHeader {
    let mut bytes = [0u8; 512];
    let head: [u8; 79] = [
        0x4b, 0x44, 0x4d, 0x56, 0x01, 0, 0, 0, 0x03, 0, 0, 0, 0x00, 0x40, 0x01, 0, //
        0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x01, 0, 0, 0, //
        0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x02, 0, 0, //
        0x15, 0, 0, 0, 0, 0, 0, 0, 0x1e, 0, 0, 0, 0, 0, 0, 0, //
        0x80, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x0a, 0x20, 0x0d, 0x0a, 0x00, 0x00,
    ];
    bytes[..79].copy_from_slice(&head);
    parse(&bytes, 0).unwrap()
}

#[test]
fn structures_have_their_sizes_on_disk() {
    assert_eq!(size_of::<SparseExtentHeader>(), 512);
    assert_eq!(size_of::<Marker>(), 16);
    assert_eq!(size_of::<CowdHeader>(), 2048);
    assert_eq!(size_of::<SeSparseConstHeader>(), 512);
    assert_eq!(size_of::<SeSparseVolatileHeader>(), 512);
}

#[test]
fn the_worked_example_of_the_sheet_is_understood() {
    let hosted = worked_example().check(131_072, 0).unwrap();
    assert_eq!(hosted.capacity_sectors, 0x14000);
    assert_eq!((hosted.gd, hosted.rgd), (0x3c00, Some(0x2a00)));
    assert_eq!(hosted.over_head, 0x10000);
    assert!(!hosted.compressed && !hosted.markers && !hosted.zeroed && hosted.warnings.is_empty());
}

#[test]
fn bad_fields_are_refused_by_name() {
    type Change = fn(&mut SparseExtentHeader);
    let cases: [(Change, Code, &str, u64); 12] = [
        (|h| h.version = 4.into(), Code::Version, "version", 4),
        (|h| h.version = 0.into(), Code::Version, "version", 4),
        (|h| h.newline_test[1] = 0x0d, Code::Corrupt, "newline test", 73),
        (|h| h.compress_algorithm = 2.into(), Code::Feature, "compressAlgorithm", 77),
        (|h| h.flags = 0x10003.into(), Code::Corrupt, "compressAlgorithm", 77),
        (|h| h.grain_size = 100.into(), Code::Range, "grainSize", 20),
        (|h| h.grain_size = 4.into(), Code::Range, "grainSize", 20),
        (|h| h.grain_size = (1u64 << 63).into(), Code::Range, "grainSize", 20),
        (|h| h.num_gtes_per_gt = 0.into(), Code::Range, "numGTEsPerGT", 44),
        (|h| h.num_gtes_per_gt = 513.into(), Code::Range, "numGTEsPerGT", 44),
        (|h| h.capacity = u64::MAX.into(), Code::Range, "capacity", 12),
        (|h| h.over_head = u64::MAX.into(), Code::OutOfFile, "overHead", 64),
    ];
    for (change, code, field, at) in cases {
        let mut header = worked_example();
        change(&mut header);
        let error = header.check(131_072, 0).unwrap_err();
        assert_eq!((error.code(), error.field_name(), error.offset()), (code, Some(field), Some(at)));
        assert!(error.hint_text().is_some() && error.found_value().is_some(), "{error}");
    }
}

#[test]
fn a_directory_out_of_the_file_falls_back_to_its_copy_or_fails() {
    let mut header = worked_example();
    header.gd_offset = 0x7fff_ffff.into();
    let hosted = header.check(131_072, 0).unwrap();
    assert_eq!(hosted.gd, 0x2a00);
    assert_eq!(hosted.warnings.len(), 1);
    header.rgd_offset = (u64::MAX - 3).into();
    let error = header.check(131_072, 0).unwrap_err();
    assert_eq!((error.code(), error.field_name()), (Code::OutOfFile, Some("gdOffset")));
}

#[test]
fn a_huge_capacity_is_refused_before_anything_is_allocated() {
    let mut header = worked_example();
    header.capacity = (1u64 << 54).into();
    assert_eq!(header.check(131_072, 0).unwrap_err().code(), Code::TableLimit);
    header.capacity = (1u64 << 40).into();
    assert_eq!(header.check(131_072, 0).unwrap_err().code(), Code::OutOfFile);
}
