//! Writing the text descriptor (sheet section 2): header, extents, disk data base, in this order.

use crate::child::NewParent;
use crate::descriptor::ExtentKind;
use std::fmt::Write;
use vellum_core::{Chs, Uuid};

/// Whose habits a new descriptor follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    VMware,
    VirtualBox,
}

/// All that stands in a new descriptor.
#[derive(Clone, Debug)]
pub(crate) struct NewDescriptor {
    pub dialect: Dialect,
    pub create_type: &'static str,
    pub cid: u32,
    pub extents: Vec<NewExtent>,
    pub hw_version: String,
    pub tools_version: String,
    pub adapter_type: String,
    pub geometry: Chs,
    pub bios: Option<Chs>,
    pub uuid: Option<Uuid>,
    pub modification: Option<Uuid>,
    pub content_id: [u64; 2],
    pub comment: String,
    pub parent: Option<NewParent>,
}

/// One extent of a new disk.
#[derive(Clone, Debug)]
pub(crate) struct NewExtent {
    pub sectors: u64,
    pub kind: ExtentKind,
    pub name: String,
}

/// Encoded bytes of a comment that VirtualBox reads.
pub(crate) const COMMENT_BYTES_MAX: usize = 1024;

impl NewDescriptor {
    /// The text, lines ending with LF.
    pub(crate) fn print(&self) -> String {
        let mut text = String::with_capacity(2048);
        let virtualbox = self.dialect == Dialect::VirtualBox;
        text.push_str("# Disk DescriptorFile\nversion=1\n");
        if !virtualbox {
            text.push_str("encoding=\"UTF-8\"\n");
        }
        // Writing into a String cannot fail.
        let parent_cid = self.parent.as_ref().and_then(|parent| parent.cid).unwrap_or(u32::MAX);
        let _ = writeln!(text, "CID={:08x}\nparentCID={parent_cid:08x}", self.cid);
        if !virtualbox {
            text.push_str("isNativeSnapshot=\"no\"\n");
        }
        let _ = writeln!(text, "createType=\"{}\"", self.create_type);
        if let Some(hint) = self.parent.as_ref().and_then(|parent| parent.hint.as_ref()) {
            let _ = writeln!(text, "parentFileNameHint=\"{hint}\"");
        }
        text.push_str("\n# Extent description\n");
        for extent in &self.extents {
            let _ = write!(text, "RW {} {} \"{}\"", extent.sectors, extent.kind.word(), extent.name);
            text.push_str(if extent.kind == ExtentKind::Flat { " 0\n" } else { "\n" });
        }
        let title = if virtualbox { "# The disk Data Base " } else { "# The Disk Data Base" };
        let _ = writeln!(text, "\n{title}\n#DDB\n");
        self.print_ddb(&mut text);
        text
    }

    fn print_ddb(&self, text: &mut String) {
        let mut pair = |key: &str, value: &dyn std::fmt::Display| {
            let _ = writeln!(text, "ddb.{key} = \"{value}\"");
        };
        pair("virtualHWVersion", &self.hw_version);
        pair("adapterType", &self.adapter_type);
        pair("geometry.cylinders", &self.geometry.cylinders);
        pair("geometry.heads", &self.geometry.heads);
        pair("geometry.sectors", &self.geometry.sectors);
        if let Some(bios) = self.bios {
            pair("geometry.biosCylinders", &bios.cylinders);
            pair("geometry.biosHeads", &bios.heads);
            pair("geometry.biosSectors", &bios.sectors);
        }
        let parents = self.parent.as_ref().and_then(|parent| parent.uuids).unwrap_or_default();
        if let Some(uuid) = self.uuid {
            pair("uuid.image", &uuid);
            pair("uuid.parent", &parents.0);
        }
        if let Some(modification) = self.modification {
            pair("uuid.modification", &modification);
            pair("uuid.parentmodification", &parents.1);
        }
        if self.dialect == Dialect::VMware {
            let [high, low] = self.content_id;
            pair("longContentID", &format_args!("{high:016x}{low:016x}"));
            pair("toolsVersion", &self.tools_version);
        }
        if !self.comment.is_empty() {
            pair("comment", &escape(&self.comment));
        }
    }
}

/// A comment as VirtualBox escapes it: one line, at most [`COMMENT_BYTES_MAX`] bytes. A longer one is cut.
pub(crate) fn escape(comment: &str) -> String {
    let mut text = String::new();
    for c in comment.chars() {
        let escaped = match c {
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            c if c.is_control() => " ".to_owned(),
            c => c.to_string(),
        };
        if text.len().saturating_add(escaped.len()) > COMMENT_BYTES_MAX {
            break;
        }
        text.push_str(&escaped);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor;
    use vellum_core::Limits;

    pub(crate) fn sample(dialect: Dialect) -> NewDescriptor {
        NewDescriptor {
            dialect,
            create_type: "twoGbMaxExtentFlat",
            cid: 0x89ab_0123,
            extents: vec![
                NewExtent { sectors: 4192256, kind: ExtentKind::Flat, name: "a b-f001.vmdk".into() },
                NewExtent { sectors: 5, kind: ExtentKind::Flat, name: "ä-f002.vmdk".into() },
            ],
            hw_version: "4".into(),
            tools_version: "2147483647".into(),
            adapter_type: "ide".into(),
            geometry: Chs { cylinders: 4, heads: 16, sectors: 63 },
            bios: Some(Chs { cylinders: 3, heads: 255, sectors: 63 }),
            uuid: Some(Uuid([7; 16])),
            modification: Some(Uuid([8; 16])),
            content_id: [1, 0x89ab_0123],
            comment: "two\nlines, a \\ and \"quotes\"".into(),
            parent: None,
        }
    }

    #[test]
    fn what_is_printed_is_read_back() {
        for dialect in [Dialect::VMware, Dialect::VirtualBox] {
            let text = sample(dialect).print();
            assert!(descriptor::looks_like_one(text.as_bytes()));
            let read = descriptor::parse(text.as_bytes(), 0, &Limits::default()).unwrap();
            assert!(read.warnings.is_empty(), "{:?}", read.warnings);
            assert_eq!(read.content_id("CID").unwrap(), Some(0x89ab_0123));
            assert_eq!(read.content_id("parentCID").unwrap(), Some(u32::MAX));
            assert_eq!(read.get("createType"), Some("twoGbMaxExtentFlat"));
            assert_eq!(read.extents.len(), 2);
            assert_eq!(read.extents[1].name.as_deref(), Some("ä-f002.vmdk"));
            assert_eq!(read.extents[0].sectors, 4192256);
            assert_eq!(read.uuid("ddb.uuid.image").unwrap(), Some(Uuid([7; 16])));
            assert_eq!(read.uuid("ddb.uuid.parent").unwrap(), None);
            assert_eq!(read.comment(), "two\nlines, a \\ and \"quotes\"");
            assert_eq!(read.small_number("ddb.geometry.biosHeads"), Some(255));
        }
    }

    #[test]
    fn header_extents_and_data_base_stand_in_this_order() {
        let text = sample(Dialect::VirtualBox).print();
        let place = |what: &str| text.find(what).unwrap();
        assert!(place("createType") < place("RW 4192256") && place("RW 5 ") < place("ddb.adapterType"));
    }

    #[test]
    fn a_long_comment_is_cut_at_a_whole_character() {
        let escaped = escape(&"ä\n".repeat(1000));
        assert!(escaped.len() <= COMMENT_BYTES_MAX && escaped.len() > COMMENT_BYTES_MAX - 4);
        assert!(escape(&"\\".repeat(2000)).len() == COMMENT_BYTES_MAX);
    }
}
