//! The variants of formats that the benchmarks convert, in the words of each tool.

/// One variant of a format.
pub struct Variant {
    /// Its name in `--pairs` and in the tables.
    pub name: &'static str,
    /// File name extension.
    pub extension: &'static str,
    /// The format's name in qemu-img.
    pub qemu: &'static str,
    /// What qemu-img needs besides `-O` to write it.
    pub qemu_target: &'static [&'static str],
    /// The format's name in Vellum.
    pub vellum: &'static str,
    /// What Vellum needs besides `-O` to write it.
    pub vellum_target: &'static [&'static str],
}

/// All variants; the first [`MATRIX`] of them make the matrix.
pub const ALL: [Variant; 8] = [
    Variant {
        name: "raw",
        extension: "raw",
        qemu: "raw",
        qemu_target: &[],
        vellum: "raw",
        vellum_target: &[],
    },
    Variant {
        name: "qcow2",
        extension: "qcow2",
        qemu: "qcow2",
        qemu_target: &[],
        vellum: "qcow2",
        vellum_target: &[],
    },
    Variant {
        name: "qcow2-zlib",
        extension: "zlib.qcow2",
        qemu: "qcow2",
        qemu_target: &["-c"],
        vellum: "qcow2",
        vellum_target: &["--compress"],
    },
    Variant {
        name: "qcow2-zstd",
        extension: "zstd.qcow2",
        qemu: "qcow2",
        qemu_target: &["-c", "-o", "compression_type=zstd"],
        vellum: "qcow2",
        vellum_target: &["--compress", "-o", "compression_type=zstd"],
    },
    Variant {
        name: "vmdk-stream",
        extension: "stream.vmdk",
        qemu: "vmdk",
        qemu_target: &["-o", "subformat=streamOptimized"],
        vellum: "vmdk",
        vellum_target: &["-o", "subformat=streamOptimized"],
    },
    Variant {
        name: "vdi",
        extension: "vdi",
        qemu: "vdi",
        qemu_target: &[],
        vellum: "vdi",
        vellum_target: &[],
    },
    // Without force_size qemu-img rounds the disk up to a CHS geometry, and the comparison of contents fails.
    Variant {
        name: "vhd",
        extension: "vhd",
        qemu: "vpc",
        qemu_target: &["-o", "force_size=on"],
        vellum: "vhd",
        vellum_target: &[],
    },
    Variant {
        name: "vmdk-sparse",
        extension: "sparse.vmdk",
        qemu: "vmdk",
        qemu_target: &["-o", "subformat=monolithicSparse"],
        vellum: "vmdk",
        vellum_target: &["-o", "subformat=monolithicSparse"],
    },
];

/// How many of [`ALL`] the matrix of `bench convert` has.
pub const MATRIX: usize = 7;

/// The variant of this name.
pub fn named(name: &str) -> Option<&'static Variant> {
    ALL.iter().find(|variant| variant.name == name)
}
