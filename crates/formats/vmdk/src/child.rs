//! New children: how a disk names its parent (sheet section 8 and the CID rules).

use crate::print::Dialect;
use vellum_core::{Code, Error, ParentLink, Result, Uuid};

/// Bytes of a file name in a descriptor.
const PLACE_BYTES_MAX: usize = 1023;

/// The lines of a descriptor that name a parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NewParent {
    /// `parentCID`; `None` is written as "no parent".
    pub cid: Option<u32>,
    /// `parentFileNameHint`.
    pub hint: Option<String>,
    /// `ddb.uuid.parent` and `ddb.uuid.parentmodification`.
    pub uuids: Option<(Uuid, Uuid)>,
}

/// How the new disk names `parent`.
pub(crate) fn link(parent: &ParentLink, dialect: Dialect, subformat: &str) -> Result<NewParent> {
    if matches!(subformat, "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs") {
        return Err(Error::new(Code::Usage, "a flat disk cannot have a parent: every byte of it is its own")
            .found(format!("subformat={subformat}"))
            .allowed("monolithicSparse, twoGbMaxExtentSparse, streamOptimized")
            .hint("choose a sparse subformat"));
    }
    let uuid = parent.identity.uuid.filter(|uuid| !uuid.is_nil());
    let uuids = uuid.map(|uuid| (uuid, parent.identity.modification.unwrap_or_default()));
    // VirtualBox links by UUID alone, also to parents of other formats, and finds them among its known disks.
    if dialect == Dialect::VirtualBox && uuids.is_some() {
        return Ok(NewParent { uuids, ..NewParent::default() });
    }
    let Some(cid) = parent.identity.cid.filter(|cid| !matches!(cid, 0xffff_fffe | 0xffff_ffff)) else {
        return Err(no_link(parent, uuid.is_some()));
    };
    let place = &parent.place;
    if place.is_empty()
        || place.len() > PLACE_BYTES_MAX
        || place.contains(|c: char| c == '"' || c.is_control())
    {
        return Err(Error::new(Code::Usage, "a VMDK cannot name a parent at this place")
            .found(place)
            .allowed(format!("1 to {PLACE_BYTES_MAX} bytes without quotes and control characters"))
            .hint("rename the parent"));
    }
    Ok(NewParent { cid: Some(cid), hint: Some(place.clone()), uuids })
}

#[cold]
fn no_link(parent: &ParentLink, has_uuid: bool) -> Error {
    let error =
        Error::new(Code::Usage, "a VMDK recognises its parent by its content id, and this one has none")
            .found(format!("a parent of format {}", parent.format));
    if has_uuid {
        return error.allowed("a VMDK, or with dialect=virtualbox an image with a UUID").hint(
            "add the option dialect=virtualbox, which links by UUID, or make the child in format qcow2",
        );
    }
    error.allowed("a VMDK").hint("make the child in format qcow2, which can have a parent of any format")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_core::Identity;

    fn parent(format: &'static str, identity: Identity) -> ParentLink {
        let (place, absolute) = ("base.img".to_owned(), "/d/base.img".to_owned());
        ParentLink { place, absolute, format, virtual_size: 1 << 20, identity, modified_unix: None }
    }

    #[test]
    fn parents_are_named_in_the_way_of_the_dialect() {
        let (uuid, changed) = (Uuid([1; 16]), Uuid([2; 16]));
        let vmware = Identity { cid: Some(7), ..Identity::default() };
        let virtualbox = Identity { cid: Some(7), uuid: Some(uuid), modification: Some(changed) };
        let vdi = Identity { cid: None, ..virtualbox };
        let of = |identity, dialect| link(&parent("x", identity), dialect, "monolithicSparse");
        let both = of(virtualbox, Dialect::VMware).unwrap();
        assert_eq!((both.cid, both.uuids), (Some(7), Some((uuid, changed))));
        assert_eq!(of(vmware, Dialect::VMware).unwrap().hint.as_deref(), Some("base.img"));
        assert_eq!(of(vmware, Dialect::VirtualBox).unwrap().cid, Some(7));
        for identity in [virtualbox, vdi] {
            let link = of(identity, Dialect::VirtualBox).unwrap();
            assert_eq!(link, NewParent { uuids: Some((uuid, changed)), ..NewParent::default() });
        }
        let hint = |error: Error| error.hint_text().unwrap_or_default().to_owned();
        assert!(hint(of(vdi, Dialect::VMware).unwrap_err()).contains("dialect=virtualbox"));
        assert!(hint(of(Identity::default(), Dialect::VMware).unwrap_err()).contains("qcow2"));
        assert_eq!(
            link(&parent("x", vmware), Dialect::VMware, "monolithicFlat").unwrap_err().code(),
            Code::Usage
        );
    }
}
