//! Writes the hostile corpus as seeds: `cargo run --bin seeds` fills `corpus/TARGET/`.

use std::fs;
use vellum_fuzz::encode;
use vellum_tests::corpus::{Content, Sparse, all, healthy};

/// Larger seeds slow the fuzzer down more than they teach it.
const SEED_MAX: usize = 64 << 10;

/// Sequences of requests that a target begins with.
const OPS_SEEDS: u64 = 200;

fn main() -> std::io::Result<()> {
    let mut count = 0;
    let mut write = |target: &str, name: &str, bytes: &[u8]| {
        if bytes.len() > SEED_MAX {
            return Ok(());
        }
        count += 1;
        fs::create_dir_all(format!("corpus/{target}"))?;
        fs::write(format!("corpus/{target}/{}", name.replace('/', "-")), bytes)
    };
    for (name, file) in healthy() {
        let extension = name.rsplit('.').next().unwrap_or_default();
        write(&format!("open_{extension}"), &format!("healthy-{name}"), &encode(&[&file]))?;
        write("probe", &format!("healthy-{name}"), &encode(&[&file]))?;
    }
    for case in all() {
        let regular: Vec<&Sparse> = case
            .files
            .iter()
            .filter_map(|file| match &file.content {
                Content::Regular(sparse) => Some(sparse),
                _ => None,
            })
            .collect();
        let input = encode(&regular[..regular.len().min(2)]);
        write("probe", &case.name, &input)?;
        write(&format!("open_{}", case.group()), &case.name, &input)?;
        let first = regular[0];
        let text = if case.group() == "vmdk" && first.len < 4096 {
            first.read(0, first.len as usize)
        } else {
            Vec::new()
        };
        if text.starts_with(b"#") {
            write("vmdk_descriptor", &case.name, &text)?;
        }
    }
    for format in ["raw", "vdi", "vhd", "vmdk", "qcow2"] {
        for seed in 1..=OPS_SEEDS {
            // What comes of them is the fuzzer's affair; half of them leave the image valid.
            let bytes = vellum_tests::disks::noise(seed, 3 + seed as usize * 3 % 250);
            write(&format!("ops_{format}"), &format!("noise-{seed}"), &bytes)?;
        }
    }
    println!("{count} seeds");
    Ok(())
}
