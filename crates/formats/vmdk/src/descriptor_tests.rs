use super::*;

fn read(text: &str) -> Result<Descriptor> {
    parse(text.as_bytes(), 0, &Limits::default())
}

fn code(text: &str) -> Code {
    read(text).unwrap_err().code()
}

#[test]
fn every_spelling_of_the_first_line_is_recognised() {
    for text in [
        "# Disk DescriptorFile\n",
        "# Disk Descriptor File\r\nversion=1",
        "#Disk DescriptorFile",
        "\n  \n#DISK DESCRIPTOR FILE  \n",
        "\u{feff}# Disk DescriptorFile\n",
    ] {
        assert!(looks_like_one(text.as_bytes()), "{text:?}");
    }
    for text in ["# Disk Descriptor", "Disk DescriptorFile", "", "#!/bin/sh\n# Disk DescriptorFile"] {
        assert!(!looks_like_one(text.as_bytes()), "{text:?}");
    }
}

#[test]
fn keys_match_in_any_case_quotes_and_blanks_are_insignificant() {
    let d = read(
        "# Disk DescriptorFile\r\n VERSION = 1 \r\nCid=0Abc\r\ncreatetype=\"custom\"   \r\n\
                  ddb.comment = \"a=b \\\\ c\\nd \\x\"\r\n",
    )
    .unwrap();
    assert_eq!(d.get("version"), Some("1"));
    assert_eq!(d.content_id("CID").unwrap(), Some(0xabc));
    assert_eq!(d.get("createType"), Some("custom"));
    assert_eq!(d.comment(), "a=b \\ c\nd \\x");
}

#[test]
fn every_kind_of_extent_line_is_read() {
    let d = read(
        "RW 4192256 SPARSE \"x-s001.vmdk\"\nrdonly 63 flat \"x y-pt.vmdk\" 7\nNOACCESS 5 ZERO\n\
         RW 1 VMFS \"v-flat.vmdk\"\nRW 2 VMFS \"v-flat.vmdk\" 9\nRW 3 VMFSSPARSE \"d-delta.vmdk\"\n\
         RW 4 SESPARSE \"s-sesparse.vmdk\"\nRW 9 VMFSRDM \"r-rdm.vmdk\"\nRW 9 VMFSRAW \"r-rdmp.vmdk\"\n\
         RW 8 FLAT \"\\\\.\\PhysicalDrive1\" 63 partUUID 0123-45 deviceId 1\n",
    )
    .unwrap();
    let kinds: Vec<_> = d.extents.iter().map(|e| (e.sectors, e.kind, e.offset)).collect();
    assert_eq!(
        kinds,
        [
            (4192256, ExtentKind::Sparse, 0),
            (63, ExtentKind::Flat, 7),
            (5, ExtentKind::Zero, 0),
            (1, ExtentKind::Vmfs, 0),
            (2, ExtentKind::Vmfs, 9),
            (3, ExtentKind::VmfsSparse, 0),
            (4, ExtentKind::SeSparse, 0),
            (9, ExtentKind::VmfsRdm, 0),
            (9, ExtentKind::VmfsRaw, 0),
            (8, ExtentKind::Flat, 63),
        ]
    );
    assert_eq!(d.extents[1].name.as_deref(), Some("x y-pt.vmdk"));
    assert_eq!(d.extents[1].access, ExtentAccess::ReadOnly);
    assert_eq!(d.extents[2].access, ExtentAccess::NoAccess);
    assert_eq!(d.extents[9].name.as_deref(), Some("\\\\.\\PhysicalDrive1"));
}

#[test]
fn numbers_that_do_not_fit_are_overflow_and_others_are_range() {
    assert_eq!(code("RW 18446744073709551616 FLAT \"a\" 0"), Code::Overflow);
    assert_eq!(code("RW 99999999999999999999999999 FLAT \"a\" 0"), Code::Overflow);
    assert_eq!(code("RW 36028797018963968 FLAT \"a\" 0"), Code::Overflow);
    assert_eq!(code("RW 1 FLAT \"a\" 18446744073709551615"), Code::Overflow);
    assert_eq!(code("RW -1 FLAT \"a\" 0"), Code::Range);
    assert_eq!(code("RW 1x FLAT \"a\" 0"), Code::Range);
    assert_eq!(code("RW"), Code::Range);
    assert_eq!(code("RW 1 FLAT \"a\""), Code::Range);
    assert_eq!(code("RW 1 FLAT \"a 0"), Code::Range);
    assert_eq!(code("RW 1 FLAT"), Code::Range);
    assert_eq!(code("RW 1 SPARSE \"\""), Code::Range);
    assert_eq!(code("RW 1 MAGIC \"a\""), Code::Feature);
    let half = "RW 18014398509481984 ZERO\n";
    assert!(read(half).is_ok());
    assert_eq!(code(&half.repeat(2)), Code::Overflow);
}

#[test]
fn errors_name_the_line() {
    let error = read("version=1\nRW 1 FLAT \"a\"\n").unwrap_err();
    assert_eq!((error.offset(), error.field_name()), (Some(10), Some("extent offset")));
    assert!(error.hint_text().is_some());
}

#[test]
fn bombs_are_refused_by_their_limit() {
    assert_eq!(code(&"RW 1 ZERO\n".repeat(5000)), Code::TableLimit);
    assert_eq!(code(&"a=b\n".repeat(1101)), Code::TableLimit);
    assert_eq!(code(&format!("RW 1 SPARSE \"{}\"", "x".repeat(5000))), Code::Range);
    assert!(read(&format!("ddb.comment = \"{}\"", "x".repeat(900_000))).is_ok());
    assert!(read(&"\n".repeat(900_000)).is_ok());
}

#[test]
fn a_nul_ends_the_text_but_not_inside_a_name() {
    let d = parse(b"CID=1\nRW 1 ZERO\n\0\0RW 5 ZERO\n", 512, &Limits::default()).unwrap();
    assert_eq!(d.extents.len(), 1);
    let error = parse(b"CID=1\nRW 1 FLAT \"a\0b\" 0\n", 512, &Limits::default()).unwrap_err();
    assert_eq!((error.code(), error.offset()), (Code::NulInName, Some(512 + 6 + 12)));
}

#[test]
fn content_ids_are_hexadecimal_and_uuids_well_formed() {
    let d = read("CID=123456789\nparentCID=+1\nddb.uuid.image=\"zz\"\nddb.uuid.parent=\"\"").unwrap();
    assert_eq!(d.content_id("CID").unwrap_err().code(), Code::Range);
    assert_eq!(d.content_id("parentCID").unwrap_err().code(), Code::Range);
    assert_eq!(d.uuid("ddb.uuid.image").unwrap_err().code(), Code::Range);
    assert_eq!(d.content_id("none").unwrap(), None);
    assert_eq!(d.uuid("ddb.uuid.parent").unwrap(), None);
}

#[test]
fn the_first_of_two_values_wins_and_is_reported() {
    let d = read("CID=1\nCID=2\nstray words\n").unwrap();
    assert_eq!(d.content_id("CID").unwrap(), Some(1));
    assert_eq!(d.warnings.len(), 2);
}

#[test]
fn windows_1252_names_are_decoded_and_unknown_encodings_reported() {
    let text = b"encoding=\"windows-1252\"\nRW 1 SPARSE \"\xe4\x80-s001.vmdk\"\n";
    let d = parse(text, 0, &Limits::default()).unwrap();
    assert_eq!(d.extents[0].name.as_deref(), Some("ä€-s001.vmdk"));
    let text = b"encoding=\"Big5\"\nRW 1 SPARSE \"\xa4\xe4-s001.vmdk\"\n";
    let d = parse(text, 0, &Limits::default()).unwrap();
    assert_eq!(d.warnings.len(), 1);
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "[RWa-z0-9 =\"\n\r#.\\\\]{0,200}") {
        let _ = read(&text);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
        let _ = parse(&bytes, u64::MAX, &Limits::default());
    }
}
