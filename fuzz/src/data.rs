//! Data for writes that tells where it belongs: cheap to make, different at every offset and for every choice.

use std::sync::OnceLock;

/// Prime: data never repeats at the distance of a block.
const PERIOD: usize = 65_521;

/// Fills `bytes`, which stand at `offset` of the disk. Choice 0 is zeros: those formats treat in a way of their own.
pub fn fill(bytes: &mut [u8], offset: u64, choice: u8) {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    if choice == 0 {
        return bytes.fill(0);
    }
    let noise = NOISE.get_or_init(|| vellum_tests::disks::noise(9, PERIOD));
    let mut from = ((offset % PERIOD as u64) as usize + usize::from(choice) * 251) % PERIOD;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (part, later) = rest.split_at_mut(rest.len().min(PERIOD - from));
        part.copy_from_slice(&noise[from..from + part.len()]);
        (rest, from) = (later, 0);
    }
}
