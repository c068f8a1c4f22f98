//! Every format and variant that Vellum writes, and how other tools call them.

use crate::writing::DISK_BYTES;
use vellum::{ConvertRequest, CreateDiskRequest};

/// A way to write a disk.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// What messages and files of the test call it.
    pub name: &'static str,
    /// The format.
    pub format: &'static str,
    /// Options of its driver.
    pub options: &'static [(&'static str, &'static str)],
    /// Compressed.
    pub compress: bool,
    /// What QEMU calls the format.
    pub qemu: &'static str,
    /// The Python module of libyal that reads it, if it knows all features of the variant.
    pub libyal: Option<&'static str>,
}

const fn plain(
    name: &'static str,
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    qemu: &'static str,
    libyal: Option<&'static str>,
) -> Variant {
    Variant { name, format, options, compress: false, qemu, libyal }
}

const VMDK: Option<&str> = Some("pyvmdk");
const VHDI: Option<&str> = Some("pyvhdi");
const QCOW: Option<&str> = Some("pyqcow");

/// All variants.
pub const VARIANTS: &[Variant] = &[
    plain("raw", "raw", &[], "raw", None),
    plain("vdi-dynamic", "vdi", &[], "vdi", None),
    plain("vdi-fixed", "vdi", &[("variant", "fixed")], "vdi", None),
    plain("vhd-dynamic", "vhd", &[], "vpc", VHDI),
    plain("vhd-dynamic-exact", "vhd", &[("force_size", "on")], "vpc", VHDI),
    plain("vhd-fixed", "vhd", &[("subformat", "fixed")], "vpc", VHDI),
    plain("vhd-fixed-exact", "vhd", &[("subformat", "fixed"), ("force_size", "on")], "vpc", VHDI),
    plain("vmdk-sparse", "vmdk", &[("subformat", "monolithicSparse")], "vmdk", VMDK),
    plain("vmdk-flat", "vmdk", &[("subformat", "monolithicFlat")], "vmdk", VMDK),
    plain(
        "vmdk-split-sparse",
        "vmdk",
        &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "9M")],
        "vmdk",
        VMDK,
    ),
    plain(
        "vmdk-split-flat",
        "vmdk",
        &[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "9M")],
        "vmdk",
        VMDK,
    ),
    plain("vmdk-stream", "vmdk", &[("subformat", "streamOptimized")], "vmdk", VMDK),
    plain("vmdk-virtualbox", "vmdk", &[("dialect", "virtualbox")], "vmdk", VMDK),
    plain("vmdk-vmfs", "vmdk", &[("subformat", "vmfs")], "vmdk", VMDK),
    plain("qcow2-v2", "qcow2", &[("compat", "v2")], "qcow2", QCOW),
    plain("qcow2-v3", "qcow2", &[("compat", "v3")], "qcow2", QCOW),
    Variant { compress: true, ..plain("qcow2-zlib", "qcow2", &[], "qcow2", QCOW) },
    Variant {
        compress: true,
        ..plain("qcow2-zstd", "qcow2", &[("compression_type", "zstd")], "qcow2", None)
    },
    plain("qcow2-extended", "qcow2", &[("extended_l2", "on")], "qcow2", None),
    plain("qcow2-data-file", "qcow2", &[("data_file", "disk.data")], "qcow2", None),
    plain(
        "qcow2-data-file-raw",
        "qcow2",
        &[("data_file", "disk.data"), ("data_file_raw", "on")],
        "qcow2",
        None,
    ),
    plain("qcow2-512", "qcow2", &[("cluster_size", "512")], "qcow2", QCOW),
    plain("qcow2-2m", "qcow2", &[("cluster_size", "2M")], "qcow2", QCOW),
    Variant { compress: true, ..plain("qcow2-zlib-4k", "qcow2", &[("cluster_size", "4k")], "qcow2", None) },
];

/// The variant with this name.
pub fn variant(name: &str) -> Variant {
    *VARIANTS.iter().find(|v| v.name == name).unwrap_or_else(|| panic!("there is no variant {name}"))
}

impl Variant {
    fn given_options(&self) -> Vec<(String, String)> {
        self.options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// An empty disk of [`DISK_BYTES`] in this variant.
    pub fn empty_disk(&self, target: &str) -> CreateDiskRequest {
        CreateDiskRequest {
            target: target.to_owned(),
            format: self.format.to_owned(),
            virtual_size: DISK_BYTES,
            options: self.given_options(),
            ..CreateDiskRequest::default()
        }
    }

    /// A conversion into this variant.
    pub fn request(&self, source: &str, target: &str) -> ConvertRequest {
        ConvertRequest {
            options: self.given_options(),
            compress: self.compress,
            threads: Some(2),
            ..ConvertRequest::new(source, target, self.format)
        }
    }
}
