//! An image as scripts see it. Names of members are stable; names inside `properties` are the format's own.

use super::open_files;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use vellum::{Chs, Identity, OpenedImage, ParentRef, Property, Storage, Value};

/// `vellum info --chain --json`
#[derive(Serialize)]
pub struct ChainReport<'a> {
    virtual_size: Option<u64>,
    chain: Vec<ImageReport<'a>>,
    warnings: &'a [String],
}

impl<'a> ChainReport<'a> {
    /// Of `images`, the top one first; `warnings` belong to none of them.
    pub fn new(images: &'a [OpenedImage], warnings: &'a [String]) -> Self {
        ChainReport {
            virtual_size: images.first().map(|image| image.layer.image.info().virtual_size),
            chain: images.iter().map(|image| ImageReport::new(image, &[])).collect(),
            warnings,
        }
    }
}

/// `vellum info --json`
#[derive(Serialize)]
pub struct ImageReport<'a> {
    image: &'a str,
    format: &'static str,
    raw_by_default: bool,
    variant: &'a str,
    virtual_size: u64,
    block_size: Option<u64>,
    files: Vec<File<'a>>,
    named_files: &'a [String],
    identity: IdentityReport,
    parent: Option<Parent<'a>>,
    comment: &'a str,
    geometry: Geometry,
    dirty: Option<&'a str>,
    properties: Properties<'a>,
    warnings: Vec<&'a str>,
}

impl<'a> ImageReport<'a> {
    /// Of `image`, with `more` warnings than it gives itself.
    pub fn new(image: &'a OpenedImage, more: &'a [String]) -> Self {
        let info = image.layer.image.info();
        ImageReport {
            image: &image.layer.location.0,
            format: image.format.name(),
            raw_by_default: image.raw_by_default,
            variant: &info.variant,
            virtual_size: info.virtual_size,
            block_size: Some(info.block_size).filter(|size| *size != 0),
            files: open_files(image).into_iter().map(File::new).collect(),
            named_files: &info.files,
            identity: IdentityReport::new(&info.identity),
            parent: info.parent.as_ref().map(Parent::new),
            comment: &info.comment,
            geometry: Geometry { physical: info.pchs.map(chs), logical: info.lchs.map(chs) },
            dirty: info.dirty.as_deref(),
            properties: Properties(&info.properties),
            warnings: info.warnings.iter().chain(more).map(String::as_str).collect(),
        }
    }
}

/// A file on the host.
#[derive(Serialize)]
struct File<'a> {
    path: &'a str,
    length: Option<u64>,
    allocated: Option<u64>,
}

impl<'a> File<'a> {
    fn new(storage: &'a dyn Storage) -> Self {
        File { path: storage.name(), length: storage.len().ok(), allocated: storage.allocated_bytes() }
    }
}

#[derive(Serialize)]
struct IdentityReport {
    uuid: Option<String>,
    modification_uuid: Option<String>,
    content_id: Option<String>,
}

impl IdentityReport {
    fn new(identity: &Identity) -> Self {
        IdentityReport {
            uuid: identity.uuid.map(|uuid| uuid.to_string()),
            modification_uuid: identity.modification.map(|uuid| uuid.to_string()),
            content_id: identity.cid.map(|cid| format!("{cid:08x}")),
        }
    }
}

#[derive(Serialize)]
struct Parent<'a> {
    places: Vec<Place<'a>>,
    format: Option<&'a str>,
    expected: IdentityReport,
}

#[derive(Serialize)]
struct Place<'a> {
    field: &'static str,
    place: &'a str,
}

impl<'a> Parent<'a> {
    fn new(parent: &'a ParentRef) -> Self {
        let place = |hint: &'a vellum::ParentHint| Place { field: hint.field, place: &hint.place };
        Parent {
            places: parent.hints.iter().map(place).collect(),
            format: parent.format.as_deref(),
            expected: IdentityReport::new(&parent.expected),
        }
    }
}

#[derive(Serialize)]
struct Geometry {
    physical: Option<ChsReport>,
    logical: Option<ChsReport>,
}

#[derive(Serialize)]
struct ChsReport {
    cylinders: u32,
    heads: u32,
    sectors: u32,
}

fn chs(chs: Chs) -> ChsReport {
    ChsReport { cylinders: chs.cylinders, heads: chs.heads, sectors: chs.sectors }
}

/// Properties in the order in which the format gives them.
struct Properties<'a>(&'a [Property]);

impl Serialize for Properties<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|property| (property.name, ValueReport(&property.value))))
    }
}

struct ValueReport<'a>(&'a Value);

impl Serialize for ValueReport<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Text(text) => serializer.serialize_str(text),
            Value::Number(number) | Value::Bytes(number) => serializer.serialize_u64(*number),
            Value::Flag(flag) => serializer.serialize_bool(*flag),
            Value::List(values) => serializer.collect_seq(values.iter().map(ValueReport)),
            Value::Record(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                for (name, value) in members {
                    map.serialize_entry(name, &ValueReport(value))?;
                }
                map.end()
            }
        }
    }
}
