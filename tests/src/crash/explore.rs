//! Going through the crash states of workloads, and counting them.

use super::cases::Case;
use super::guest::Workload;
use super::peer::Peer;
use super::run::{Kept, run};
use super::start::{Start, start};
use super::verify::{Promise, Survivor, snapshots, verify};
use super::view::{Marks, View};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use vellum::FlushPoint;
use vellum_sim::{Crash, Depth, FileSet, Mask, Oracle, Random, Trace, hash_of, masks, mix};

/// How thoroughly states are enumerated.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Subsets of the operations of a workload.
    pub depth: Depth,
    /// Subsets of the operations of a recovery.
    pub recovery_depth: Depth,
    /// One of so many states is crashed again inside its recovery; of those, one of so many a third time.
    pub again: u64,
    /// Which flushes of the driver are left out.
    pub left_out: Option<FlushPoint>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            depth: Depth { exhaustive: 7, samples: 120 },
            recovery_depth: Depth { exhaustive: 6, samples: 30 },
            again: 40,
            left_out: None,
        }
    }
}

/// A moment of a trace and what was lost; then the same in the recovery that followed.
pub type Path = Vec<(usize, Mask)>;

/// A promise that was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The case.
    pub case: Case,
    /// The workload.
    pub workload: Workload,
    /// Where the power went; empty if it did not.
    pub path: Path,
    /// What is wrong.
    pub message: String,
    /// The operations that may be lost, and what became of them.
    pub explanation: String,
}

/// Writes a path as replay lines have it.
pub fn path_text(path: &Path) -> String {
    path.iter().map(|(cut, mask)| format!("{cut}:{mask}")).collect::<Vec<_>>().join(">")
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { name, format, options, .. } = self.case;
        writeln!(f, "{format} ({name}) {options:?}: {}", self.message)?;
        writeln!(f, "  workload  {}", self.workload)?;
        writeln!(f, "  cut:mask  {}", path_text(&self.path))?;
        f.write_str(&self.explanation)?;
        write!(
            f,
            "  replay    VELLUM_CRASHSIM='case={name};{};at={}' cargo test -p vellum-tests --test crashsim replay -- --nocapture",
            self.workload,
            path_text(&self.path)
        )
    }
}

/// What may be asked of a trace: the files that it began with, and what the guest may see.
struct Scene<'a> {
    trace: &'a Trace,
    files: &'a FileSet,
    oracle: &'a mut Oracle,
    before: &'a (View, Marks),
    kept: &'a [Kept],
}

/// Goes through crash states of one case.
pub struct Explorer {
    /// The case.
    pub case: Case,
    /// The image that workloads begin with.
    pub start: Arc<Start>,
    /// Settings.
    pub settings: Settings,
    /// Hashes of all states that were checked.
    pub distinct: HashSet<u64>,
    /// Of these, those that are crashes inside a recovery.
    pub recovery_states: usize,
    /// Workloads that were run.
    pub workloads: usize,
    /// The other program that looks at a few states.
    pub peer: Option<Peer>,
}

impl Explorer {
    /// An explorer of `case`.
    ///
    /// # Errors
    /// The image could not be made.
    pub fn new(case: Case, settings: Settings) -> vellum::Result<Self> {
        let start = Arc::new(start(&case)?);
        Ok(Explorer {
            case,
            start,
            settings,
            distinct: HashSet::new(),
            recovery_states: 0,
            workloads: 0,
            peer: None,
        })
    }

    /// Runs `workload` and checks its crash states.
    pub fn explore(&mut self, workload: &Workload) -> Result<(), Box<Failure>> {
        self.workloads += 1;
        let mut ran = run(&self.case, &self.start, workload, self.settings.left_out);
        if let Some(message) = ran.failure {
            return Err(Box::new(Failure {
                case: self.case,
                workload: workload.clone(),
                path: Vec::new(),
                message,
                explanation: String::new(),
            }));
        }
        let start = self.start.clone();
        let scene = Scene {
            trace: &ran.trace,
            files: &start.files,
            oracle: &mut ran.oracle,
            before: &start.seen,
            kept: &ran.kept,
        };
        self.scene(workload, scene, &Vec::new())
    }

    /// Checks the crash states of a trace; `path` leads to it.
    fn scene(&mut self, workload: &Workload, scene: Scene<'_>, path: &Path) -> Result<(), Box<Failure>> {
        let Scene { trace, files, oracle, before, kept } = scene;
        let depth = if path.is_empty() { self.settings.depth } else { self.settings.recovery_depth };
        let mut random = Random::new(mix(hash_of(workload.to_string().as_bytes()), path.len() as u64));
        let mut seen: HashMap<u64, Arc<View>> = HashMap::new();
        for cut in self.moments(trace) {
            let crash = Crash::at(trace, files, cut).garbling(|bytes| self.case.is_sealed(bytes));
            let allowed = oracle.after_crash(cut);
            let changes_snapshots = workload.changes_snapshots();
            let promise = Promise { allowed: &allowed, before, changes_snapshots };
            for mask in masks(&crash.members, depth, &mut random) {
                let set = crash.state(&mask);
                let hash = set.hash();
                let mut here = path.clone();
                here.push((cut, mask));
                let fail = |path: &Path, message: String| {
                    let explanation = path.last().map_or(String::new(), |(_, mask)| crash.explain(mask));
                    let (case, workload) = (self.case, workload.clone());
                    Box::new(Failure { case, workload, path: path.clone(), message, explanation })
                };
                if let Some(view) = seen.get(&hash) {
                    if let Some(sector) = allowed.violation(view) {
                        let message = verify(&self.case, &self.start, &set, promise).err();
                        let message = message.unwrap_or_else(|| format!("sector {sector} is not allowed"));
                        return Err(fail(&here, message));
                    }
                    continue;
                }
                let survivor = verify(&self.case, &self.start, &set, promise).map_err(|m| fail(&here, m))?;
                snapshots(&self.case, &set, kept, cut)
                    .and_then(|()| snapshots(&self.case, &survivor.recovered, kept, cut))
                    .map_err(|m| fail(&here, m))?;
                if let Some(peer) = &mut self.peer {
                    peer.look(&self.case, hash, (!changes_snapshots).then_some(&set), &survivor.recovered)
                        .map_err(|m| fail(&here, m))?;
                }
                seen.insert(hash, Arc::new(survivor.seen.0.clone()));
                if self.distinct.insert(hash) && !path.is_empty() {
                    self.recovery_states += 1;
                }
                let lasting: Vec<Kept> =
                    kept.iter().filter(|kept| kept.from <= cut && cut <= kept.until).cloned().collect();
                self.deeper(workload, &set, survivor, &here, hash, &lasting)?;
            }
        }
        Ok(())
    }

    /// Loses power again while the image is recovered.
    fn deeper(
        &mut self,
        workload: &Workload,
        set: &FileSet,
        mut survivor: Survivor,
        path: &Path,
        hash: u64,
        lasting: &[Kept],
    ) -> Result<(), Box<Failure>> {
        let one_of = self.settings.again.saturating_pow(path.len() as u32);
        if self.settings.again == 0 || path.len() > 2 || !mix(hash, 11).is_multiple_of(one_of) {
            return Ok(());
        }
        let Survivor { seen, recovery, oracle, .. } = &mut survivor;
        let kept: Vec<Kept> =
            lasting.iter().map(|kept| Kept { from: 0, until: usize::MAX, ..kept.clone() }).collect();
        let scene = Scene { trace: recovery, files: set, oracle, before: seen, kept: &kept };
        self.scene(workload, scene, path)
    }

    /// Where power goes. Where flushes are left out, also at the end of each request: its answer is a promise.
    fn moments(&self, trace: &Trace) -> Vec<usize> {
        let mut moments = Crash::moments(trace);
        if self.settings.left_out.is_some() {
            let ends = trace.events.iter().enumerate().filter_map(|(at, event)| match event {
                vellum_sim::Event::GuestEnds(_, true) => Some(at + 1),
                _ => None,
            });
            moments.extend(ends);
            moments.sort_unstable();
            moments.dedup();
        }
        moments
    }

    /// Follows a path and checks the state that it leads to.
    pub fn replay(&mut self, workload: &Workload, path: &Path) -> Result<(), Box<Failure>> {
        let mut ran = run(&self.case, &self.start, workload, self.settings.left_out);
        let fail = |message: String, explanation: String| {
            let (case, workload) = (self.case, workload.clone());
            Box::new(Failure { case, workload, path: path.clone(), message, explanation })
        };
        if let Some(message) = ran.failure {
            return Err(fail(message, String::new()));
        }
        let (mut files, mut before) = (self.start.files.clone(), self.start.seen.clone());
        for (cut, mask) in path {
            let crash = Crash::at(&ran.trace, &files, *cut);
            let allowed = ran.oracle.after_crash(*cut);
            let set = crash.state(mask);
            let changes_snapshots = workload.changes_snapshots();
            let promise = Promise { allowed: &allowed, before: &before, changes_snapshots };
            let checked = verify(&self.case, &self.start, &set, promise);
            let survivor = checked.map_err(|message| fail(message, crash.explain(mask)))?;
            snapshots(&self.case, &set, &ran.kept, *cut)
                .and_then(|()| snapshots(&self.case, &survivor.recovered, &ran.kept, *cut))
                .map_err(|message| fail(message, crash.explain(mask)))?;
            ran.kept.retain(|kept| kept.from <= *cut && *cut <= kept.until);
            for kept in &mut ran.kept {
                (kept.from, kept.until) = (0, usize::MAX);
            }
            (files, before) = (set, survivor.seen);
            ran.trace = survivor.recovery;
            ran.oracle = survivor.oracle;
        }
        Ok(())
    }
}
