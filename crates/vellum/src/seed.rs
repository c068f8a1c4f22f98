//! [`Seed`]: time and randomness of a job, so that an interrupted or repeated one gives the same bytes.

use sha2::{Digest, Sha256};
use vellum_core::{OptionValues, Providers, Result};

/// Seed and time of a job's providers.
pub(crate) struct Seed {
    pub seed: u128,
    pub unix_time: u64,
}

impl Seed {
    pub fn random() -> Result<Self> {
        let system = Providers::system()?;
        let seed = u128::from(system.random_u64()) << 64 | u128::from(system.random_u64());
        Ok(Seed { seed, unix_time: system.unix_time })
    }

    /// Depends on format, size, options and how the disk begins. The time is 2000-01-01, the zero of VHD's clock.
    pub fn reproducible(format: &str, size: u64, options: &OptionValues, beginning: &[u8]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(format!("vellum {format} {size} {:?}", options.list()));
        hasher.update(beginning);
        let hash = hasher.finalize();
        let mut seed = [0u8; 16];
        seed.copy_from_slice(&hash[..16]);
        Seed { seed: u128::from_le_bytes(seed), unix_time: 946_684_800 }
    }

    pub fn providers(&self) -> Providers {
        Providers::seeded(self.seed, self.unix_time)
    }
}
