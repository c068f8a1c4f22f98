//! [`Vellum`]: the formats, the resolver and the limits that every job uses.

use std::sync::Arc;
use vellum_core::{
    Access, Asker, ChainOptions, Code, Disk, Error, Format, FormatRegistry, OpenedImage, Resolver, Result,
    WriteAccess, block_on,
};
pub use vellum_io::FilePolicy;

/// The entry to the library. Cheap to clone.
#[derive(Clone)]
pub struct Vellum {
    pub(crate) formats: FormatRegistry,
    pub(crate) resolver: Arc<dyn Resolver>,
}

/// All formats of this build, in the order in which they are tried.
pub fn formats() -> Vec<Arc<dyn Format>> {
    vec![
        Arc::new(vellum_format_qcow2::Qcow2),
        Arc::new(vellum_format_vmdk::Vmdk),
        Arc::new(vellum_format_vdi::Vdi),
        Arc::new(vellum_format_vhd::Vhd),
        Arc::new(vellum_format_raw::Raw),
    ]
}

impl Vellum {
    /// Vellum with all formats over `resolver`.
    pub fn new(resolver: Arc<dyn Resolver>) -> Self {
        Vellum { formats: FormatRegistry::new(formats()), resolver }
    }

    /// Vellum over the files of this machine, under `policy`.
    pub fn local(policy: FilePolicy) -> Self {
        Vellum::new(Arc::new(vellum_io::LocalFiles::new(policy, vellum_io::OpenOptions::default())))
    }

    /// The formats.
    pub fn formats(&self) -> &FormatRegistry {
        &self.formats
    }

    /// The resolver.
    pub fn resolver(&self) -> &Arc<dyn Resolver> {
        &self.resolver
    }

    /// Opens a disk with all its parents: for reading, unless [`ChainOptions::write`] says otherwise. Parents are
    /// always opened for reading.
    pub fn open(&self, name: &str, options: &ChainOptions) -> Result<(Disk, Vec<OpenedImage>)> {
        block_on(self.formats.open_chain(&self.resolver, name, options))
    }

    /// Opens a disk for writing, with all its parents for reading; [`WriteAccess::IfPossible`] may fall back to reading.
    /// [`Disk::close`] ends the writing; nothing else makes everything durable.
    ///
    /// # Errors
    /// `USAGE` if the options name a snapshot: such a state can only be read.
    pub fn open_for_writing(&self, name: &str, options: &ChainOptions) -> Result<(Disk, Vec<OpenedImage>)> {
        if options.snapshot.is_some() {
            return Err(Error::new(Code::Usage, "a snapshot can only be read")
                .image(name)
                .hint("apply it first, or convert it into an image of its own"));
        }
        let write = match options.write {
            WriteAccess::No => WriteAccess::Yes,
            asked => asked,
        };
        self.open(name, &ChainOptions { write, ..options.clone() })
    }

    /// Opens an image alone: no parent, no extent, no data file is touched.
    pub fn open_alone(&self, name: &str, options: &ChainOptions) -> Result<OpenedImage> {
        block_on(self.formats.open_alone(&self.resolver, name, options))
    }

    /// Which format a file has by its content; `None` when no format claims it.
    pub fn probe(&self, name: &str) -> Result<Option<&'static str>> {
        let found: Result<_, Error> = block_on(async {
            let opened = self.resolver.open(name, &Asker::User, Access::default()).await?;
            self.formats.probe(opened.storage.as_ref()).await
        });
        found.map(|probe| (!probe.by_default).then(|| probe.format.name()))
    }
}
