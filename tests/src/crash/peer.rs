//! I9: another program looks at a few of the states.

use super::cases::Case;
use super::start::{DISK, open, usual_flags};
use super::view::content;
use crate::tools::{run, text};
use crate::writing::is_count_ahead;
use vellum_sim::{FileSet, SimFiles, mix};

/// What is looked at: a crash state, before anybody wrote to it.
const CRASHED: &str = "after the crash";

/// `qemu-img` and how often it was asked.
pub struct Peer {
    directory: tempfile::TempDir,
    /// States that it looked at.
    pub looked: usize,
    most: usize,
    one_of: u64,
}

impl Peer {
    /// Looks at one of `one_of` states, `most` at most.
    pub fn new(most: usize, one_of: u64) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        Peer { directory, looked: 0, most, one_of }
    }

    /// Compares what QEMU sees of the crash state and of the recovered image with what we see.
    pub fn look(
        &mut self,
        case: &Case,
        hash: u64,
        crashed: Option<&FileSet>,
        recovered: &FileSet,
    ) -> Result<(), String> {
        let Some(format) = case.peer else { return Ok(()) };
        if self.looked >= self.most || !mix(hash, 5).is_multiple_of(self.one_of) {
            return Ok(());
        }
        self.looked += 1;
        // VMDK keeps two copies of each table. A crash may leave them different, and then QEMU reads the other one.
        if let Some(crashed) = crashed.filter(|_| format != "vmdk") {
            self.compare(case, format, crashed, CRASHED)?;
        }
        self.compare(case, format, recovered, "after recovery")
    }

    fn compare(&self, case: &Case, format: &str, set: &FileSet, when: &str) -> Result<(), String> {
        let directory = self.directory.path();
        for (name, id) in &set.names {
            let bytes = set.contents[*id].to_vec();
            std::fs::write(directory.join(name), bytes).expect("writing a temporary file");
        }
        let disk =
            open(&SimFiles::new(set.clone()), case, false, usual_flags()).map_err(|e| format!("{e:?}"))?;
        let seen = content(&disk).map_err(|e| format!("{e:?}"))?;
        std::fs::write(directory.join("seen.raw"), seen.to_vec()).expect("writing a temporary file");
        let (image, raw) = (directory.join(DISK), directory.join("seen.raw"));
        let args = ["compare", "-f", format, "-F", "raw", text(&image), text(&raw)];
        let output = run("qemu-img", "qemu-utils", &args);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr);
            return Err(format!("I9, {when}: qemu-img compare: {said}{errors}"));
        }
        if !matches!(format, "qcow2" | "vdi") {
            return Ok(());
        }
        let output = run("qemu-img", "qemu-utils", &["check", "-f", format, text(&image)]);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        match (format, output.status.code()) {
            (_, Some(0)) => Ok(()),
            // Leaks and nothing else.
            ("qcow2", Some(3)) => Ok(()),
            // The counter is written before the map, never after it; the session that follows sets it right.
            ("vdi", _) if when == CRASHED && is_count_ahead(&said) => Ok(()),
            (_, code) => Err(format!("I9, {when}: qemu-img check ends with {code:?}: {said}")),
        }
    }
}
