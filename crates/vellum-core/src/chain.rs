//! Opening an image with its parents: probing, finding, recognising.
//!
//! The parent of an image is looked for where the image says (through the [`Resolver`], which may refuse), at the
//! places that the user gave, and, for formats that store only an identity (VDI, VirtualBox's VMDK), among the
//! images of the same directory. What is found must have the identity that the child states.

use crate::shareable;
use crate::{
    Access, Asker, BoxFuture, Buf, Code, Confidence, Disk, DiskOptions, Error, Events, Format, Identity,
    Layer, Limits, Location, OpenRequest, Opened, ParentRef, Providers, Resolver, Result, Sample, Storage,
    Uuid,
};
use std::collections::HashMap;
use std::sync::Arc;

/// The formats that are known, in the order in which they are tried.
#[derive(Clone, Default)]
pub struct FormatRegistry(Vec<Arc<dyn Format>>);

/// What probing found.
pub struct Probe {
    /// The format.
    pub format: Arc<dyn Format>,
    /// No format claims the file: it is read as raw because nothing else is left.
    pub by_default: bool,
}

impl FormatRegistry {
    /// A table of `formats`.
    pub fn new(formats: Vec<Arc<dyn Format>>) -> Self {
        FormatRegistry(formats)
    }

    /// All formats.
    pub fn all(&self) -> &[Arc<dyn Format>] {
        &self.0
    }

    /// The format that users call `name`.
    pub fn by_name(&self, name: &str) -> Result<Arc<dyn Format>> {
        let wanted = name.to_ascii_lowercase();
        let found = self.0.iter().find(|f| f.name() == wanted || f.aliases().contains(&wanted.as_str()));
        found.cloned().ok_or_else(|| {
            let known: Vec<&str> = self.0.iter().map(|f| f.name()).collect();
            Error::new(Code::Usage, format!("there is no format {name:?}"))
                .allowed(known.join(", "))
                .hint("`vellum formats` lists the formats")
        })
    }

    /// Recognises a file by head and tail. What nobody claims is raw, by default.
    pub async fn probe(&self, storage: &dyn Storage) -> Result<Probe> {
        let len = storage.len()?;
        let align = u64::from(storage.limits().alignment.max(1));
        let take = (Sample::LEN as u64).min(len);
        let head = read_sample(storage, 0, take, align).await?;
        let tail_start = len - take;
        let tail = read_sample(storage, tail_start, take, align).await?;
        let sample = Sample { head: &head, tail: &tail, len };
        let mut claims: Vec<(Confidence, &Arc<dyn Format>)> =
            self.0.iter().map(|f| (f.probe(&sample), f)).filter(|(c, _)| *c != Confidence::No).collect();
        claims.sort_by_key(|(confidence, _)| std::cmp::Reverse(*confidence));
        match claims[..] {
            [] => Ok(Probe { format: self.by_name("raw")?, by_default: true }),
            [(first, a), (second, b), ..] if first == second => Err(Error::new(
                Code::Ambiguous,
                format!("both {} and {} claim this file", a.name(), b.name()),
            )
            .image(storage.name())
            .hint("say which it is with -f FORMAT")),
            [(_, format), ..] => Ok(Probe { format: format.clone(), by_default: false }),
        }
    }
}

async fn read_sample(storage: &dyn Storage, offset: u64, len: u64, align: u64) -> Result<Vec<u8>> {
    // Direct storages take aligned requests only; the sample is cut out of an aligned one.
    let start = offset / align * align;
    let end = (offset + len).next_multiple_of(align).min(storage.len()?);
    let (buf, result) = storage.read_at(Buf::zeroed((end - start) as usize), start).await;
    result.map_err(|e| e.context("recognising the format"))?;
    let skip = (offset - start) as usize;
    Ok(buf[skip..skip + len as usize].to_vec())
}

/// How a chain is opened.
#[derive(Clone, Default)]
pub struct ChainOptions {
    /// Format of the top image; recognised by content if `None`. What no format claims is then read as raw, and not
    /// written.
    pub format: Option<String>,
    /// Places of parents given by the user, nearest parent first.
    pub parents: Vec<Location>,
    /// Recognise by content the format of a parent that the child does not state. Otherwise such a parent is an error
    /// unless its identity is checked, because a guest can forge a header in raw data.
    pub probe_parents: bool,
    /// Use a parent although it was modified after the child was made.
    pub allow_modified_parent: bool,
    /// Limits for each image.
    pub limits: Limits,
    /// Where warnings go.
    pub events: Events,
    /// Whether the top image is opened for writing. Parents never are.
    pub write: WriteAccess,
    /// Several processes may write the image at the same time, if all of them say so (the seed's
    /// `VD_OPEN_FLAGS_SHAREABLE`). Counts for writing only, and for images whose writing changes no table: raw, fixed VDI
    /// and VHD, flat VMDK, without a parent. Others are refused with `USAGE`.
    ///
    /// Fixed at opening, unlike [`crate::OpenFlags`]. Such a session sets no mark and changes no identity (modification
    /// UUID, CID), because processes that begin at different times would change them under each other. So children of the
    /// image do not notice that it was modified. Each process keeps its own requests apart; what overlapping writes of two
    /// processes leave, and in which order, is the guests' affair, as on a shared disk.
    pub shareable: bool,
    /// A hint that the disk is read or written mostly from its start to its end (the seed's
    /// `VD_OPEN_FLAGS_SEQUENTIAL`): the host reads further ahead in all files of the chain. Never an error.
    pub sequential: bool,
    /// Write although the image is marked dirty or corrupt.
    pub skip_consistency_checks: bool,
    /// Open the state of an internal snapshot (id or name) of the top image.
    pub snapshot: Option<String>,
    /// Time and randomness for identities that change with writing; the machine's own if `None`.
    pub providers: Option<Providers>,
    /// Options of the disk.
    pub disk: DiskOptions,
}

impl ChainOptions {
    fn access(&self, write: bool) -> Access {
        Access { write, shareable: write && self.shareable, sequential: self.sequential }
    }
}

/// Whether an image is opened for writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteAccess {
    /// For reading.
    #[default]
    No,
    /// For writing, or not at all.
    Yes,
    /// For writing if that is possible, else for reading, with a warning that says why.
    IfPossible,
}

/// An image that was opened, and how it was recognised.
pub struct OpenedImage {
    /// The image and its location.
    pub layer: Layer,
    /// Its driver.
    pub format: Arc<dyn Format>,
    /// It was read as raw because no format claims it.
    pub raw_by_default: bool,
    /// The file that was named.
    pub storage: Arc<dyn Storage>,
}

impl FormatRegistry {
    /// Opens one image, without its parents.
    #[allow(clippy::too_many_arguments)]
    pub async fn open_image(
        &self,
        resolver: &Arc<dyn Resolver>,
        opened: Opened,
        format: Option<&str>,
        options: &ChainOptions,
        open_parts: bool,
        write: bool,
        snapshot: Option<&str>,
    ) -> Result<OpenedImage> {
        let Opened { storage, location } = opened;
        let probe = match format {
            Some(name) => Probe { format: self.by_name(name)?, by_default: false },
            None => self.probe(storage.as_ref()).await?,
        };
        let request = OpenRequest {
            storage: storage.clone(),
            location: location.clone(),
            resolver: resolver.clone(),
            limits: options.limits,
            events: options.events.clone(),
            open_parts,
            write,
            access: options.access(write),
            skip_consistency_checks: options.skip_consistency_checks,
            snapshot: snapshot.map(str::to_owned),
            providers: match (&options.providers, write) {
                (Some(providers), _) => providers.clone(),
                (None, true) => Providers::system()?,
                (None, false) => Providers::seeded(0, 0),
            },
        };
        let name = probe.format.name();
        let image =
            probe.format.open(request).await.map_err(|e| {
                e.format(name).image(&location).context(format!("opening {location} as {name}"))
            })?;
        let layer = Layer { image, location };
        Ok(OpenedImage { layer, format: probe.format, raw_by_default: probe.by_default, storage })
    }

    /// Opens an image that the user named, with all its parents.
    pub async fn open_chain(
        &self,
        resolver: &Arc<dyn Resolver>,
        name: &str,
        options: &ChainOptions,
    ) -> Result<(Disk, Vec<OpenedImage>)> {
        let mut images = vec![self.open_top(resolver, name, options).await?];
        let mut neighbours = Neighbours::new();
        while let Some(parent) = images.last().and_then(|child| child.layer.image.info().parent.clone()) {
            if images.len() >= options.limits.chain_depth {
                return Err(Error::new(Code::Depth, "the chain of parents is too long")
                    .image(name)
                    .found(format!("more than {} images", images.len()))
                    .allowed(format!("up to {}", options.limits.chain_depth))
                    .hint("merge some of the images"));
            }
            let found = self.find_parent(resolver, &images, &parent, options, &mut neighbours).await?;
            check_cycle(&images, &found)?;
            images.push(found);
        }
        let layers = images.iter().map(|image| image.layer.clone()).collect();
        Ok((Disk::build(layers, options.disk.clone(), options.shareable)?, images))
    }

    async fn open_top(
        &self,
        resolver: &Arc<dyn Resolver>,
        name: &str,
        options: &ChainOptions,
    ) -> Result<OpenedImage> {
        let open = async |write: bool| {
            let opened = resolver.open(name, &Asker::User, options.access(write)).await?;
            let (format, snapshot) = (options.format.as_deref(), options.snapshot.as_deref());
            let image = self.open_image(resolver, opened, format, options, true, write, snapshot).await?;
            match write && image.raw_by_default {
                true => return Err(not_known_to_be_raw(&image.layer.location)),
                false if write && options.shareable => shareable::check(&image.layer).await?,
                false => {}
            }
            Ok(image)
        };
        match options.write {
            WriteAccess::No => open(false).await,
            WriteAccess::Yes => open(true).await,
            WriteAccess::IfPossible => match open(true).await {
                Ok(image) => Ok(image),
                Err(error) => {
                    let image = open(false).await?;
                    options.events.warn(&format!("{name}: opened for reading only: {error}"));
                    Ok(image)
                }
            },
        }
    }

    /// Finds and opens the parent of the last of `images`.
    fn find_parent<'a>(
        &'a self,
        resolver: &'a Arc<dyn Resolver>,
        images: &'a [OpenedImage],
        parent: &'a ParentRef,
        options: &'a ChainOptions,
        neighbours: &'a mut Neighbours,
    ) -> BoxFuture<'a, Result<OpenedImage>> {
        Box::pin(async move {
            let Some(child) = images.last().map(|image| &image.layer) else {
                return Err(Error::new(Code::Usage, "a parent without a child"));
            };
            let search = Search { formats: self, resolver, child, parent, options };
            if let Some(given) = options.parents.get(images.len() - 1) {
                let opened = resolver.open(&given.0, &Asker::User, options.access(false)).await?;
                let found = search.open(opened, true).await?;
                return search.recognise(found);
            }
            let asker = Asker::Parent { of: child.location.clone() };
            let mut refused = None;
            let mut tried = Vec::new();
            for hint in &parent.hints {
                match resolver.open(&hint.place, &asker, options.access(false)).await {
                    Ok(opened) => {
                        tried.push(opened.location.0.clone());
                        let found = search.open(opened, false).await?;
                        return search.recognise(found);
                    }
                    Err(error) if error.code() == Code::NotFound => tried.push(hint.place.clone()),
                    Err(error) if let Some(image) = locked_by(images, &error) => {
                        return Err(cycle(&child.location, &image.layer.location));
                    }
                    Err(error) => {
                        let error = error.image(&child.location).field(hint.field).found(&hint.place);
                        refused.get_or_insert(error);
                    }
                }
            }
            if parent.expected.uuid.is_some()
                && let Some(found) = search.siblings(images, neighbours).await?
            {
                return search.recognise(found);
            }
            if let Some(uuid) = parent.expected.uuid
                && let Some(image) = images.iter().find(|i| i.layer.image.info().identity.uuid == Some(uuid))
            {
                // Images that know each other by UUID only: the parent is one of those that are open already.
                return Err(cycle(&child.location, &image.layer.location));
            }
            match refused {
                Some(error) => Err(error
                    .hint("if you trust the image, name its parent with --parent FILE")
                    .context(format!("looking for the parent of {}", child.location))),
                None => Err(search.missing(&tried)),
            }
        })
    }
}

/// The UUIDs of the files beside an image, as far as they were looked at: each is looked at once for a whole chain.
type Neighbours = HashMap<Location, Option<Uuid>>;

/// The search for the parent of one image.
struct Search<'a> {
    formats: &'a FormatRegistry,
    resolver: &'a Arc<dyn Resolver>,
    child: &'a Layer,
    parent: &'a ParentRef,
    options: &'a ChainOptions,
}

impl Search<'_> {
    async fn open(&self, opened: Opened, named_by_user: bool) -> Result<OpenedImage> {
        let identified = self.parent.expected != Identity::default();
        let location = opened.location.clone();
        let format = self.parent.format.as_deref();
        if let Some(name) = format
            && let Err(unknown) = self.formats.by_name(name)
        {
            // The image says so, not the user: it is no misuse.
            return Err(Error::new(
                Code::Feature,
                "the image says that its parent has a format that is not known",
            )
            .image(&self.child.location)
            .found(name)
            .allowed(unknown.allowed_values().unwrap_or_default())
            .hint("convert the parent with a tool that knows the format"));
        }
        let found = self
            .formats
            .open_image(self.resolver, opened, format, self.options, true, false, None)
            .await
            .map_err(|e| e.context(format!("opening the parent of {}", self.child.location)))?;
        let probed = format.is_none() && !found.raw_by_default;
        if probed && !identified && !named_by_user && !self.options.probe_parents {
            return Err(Error::new(
                Code::FormatRequired,
                "the image does not say which format its parent has",
            )
            .image(&self.child.location)
            .found(format!("{location} looks like {}", found.format.name()))
            .hint("if you trust the parent, repeat with --probe-parents, or name it with --parent FILE"));
        }
        Ok(found)
    }

    /// Looks among the images of the child's directory for the one with the expected UUID.
    async fn siblings(
        &self,
        images: &[OpenedImage],
        neighbours: &mut Neighbours,
    ) -> Result<Option<OpenedImage>> {
        let wanted = self.parent.expected.uuid;
        for location in self.resolver.siblings(&self.child.location).await? {
            if images.iter().any(|image| image.layer.location == location) {
                continue;
            }
            let known = neighbours.get(&location).copied();
            if known.is_some_and(|uuid| uuid != wanted) {
                continue;
            }
            let asker = Asker::Parent { of: self.child.location.clone() };
            let name = self.resolver.file_name(&location);
            let Ok(opened) = self.resolver.open(&name, &asker, self.options.access(false)).await else {
                continue;
            };
            if known.is_none() {
                let uuid = self.uuid_of(opened.clone()).await;
                neighbours.insert(location, uuid);
                if uuid != wanted {
                    continue;
                }
            }
            let found =
                self.formats.open_image(self.resolver, opened, None, self.options, true, false, None).await?;
            return Ok(Some(found));
        }
        Ok(None)
    }

    /// The UUID of a neighbour. Only what some format claims can have one; a broken neighbour is not our affair.
    async fn uuid_of(&self, opened: Opened) -> Option<Uuid> {
        let probe = self.formats.probe(opened.storage.as_ref()).await.ok()?;
        if probe.by_default {
            return None;
        }
        let found = self
            .formats
            .open_image(self.resolver, opened, None, self.options, false, false, None)
            .await
            .ok()?;
        found.layer.image.info().identity.uuid
    }

    /// Compares the identity of what was found with what the child expects.
    fn recognise(&self, found: OpenedImage) -> Result<OpenedImage> {
        let have = found.layer.image.info().identity;
        let want = self.parent.expected;
        let differs = |code, what: &str, have: String, want: String, hint: &str| {
            Err(Error::new(code, what)
                .image(&self.child.location)
                .found(format!("{} with {have}", found.layer.location))
                .allowed(want)
                .hint(hint))
        };
        let text = |id: Option<crate::Uuid>| id.map_or("no UUID".to_owned(), |id| format!("UUID {id}"));
        if want.uuid.is_some() && want.uuid != have.uuid {
            return differs(
                Code::ParentWrong,
                "the image found is not the parent",
                text(have.uuid),
                text(want.uuid),
                "name the right parent with --parent FILE",
            );
        }
        let hint = "reading the child would give mixed data; if you know better, use --allow-modified-parent";
        let modified = "the parent was modified after the child was made";
        if !self.options.allow_modified_parent {
            if want.modification.is_some() && want.modification != have.modification {
                return differs(
                    Code::ParentModified,
                    modified,
                    text(have.modification),
                    text(want.modification),
                    hint,
                );
            }
            if let (Some(want), have) = (want.cid, have.cid)
                && have != Some(want)
            {
                let have = have.map_or("no CID".to_owned(), |cid| format!("CID {cid:08x}"));
                return differs(Code::ParentModified, modified, have, format!("CID {want:08x}"), hint);
            }
            self.look_at_the_clock(&found);
        }
        Ok(found)
    }

    /// Warns if the parent seems to have been changed since the child was made. (VHD has nothing better than times. The one
    /// that a child stores is that of the parent's file, or the one in the parent, depending on who made it.)
    fn look_at_the_clock(&self, found: &OpenedImage) {
        let Some(want) = self.parent.modified_unix else { return };
        let of_file = found.storage.modified_ns().and_then(|ns| u64::try_from(ns / 1_000_000_000).ok());
        let Some(of_file) = of_file else { return };
        let known = [Some(of_file), found.layer.image.info().modified_unix];
        // File systems of two-second steps, and writers that round.
        if known.into_iter().flatten().all(|time| time.abs_diff(want) > 2) {
            self.options.events.warn(&format!(
                "{}: the parent {} may have been modified after the child was made: it was last changed {of_file} seconds \
                 after 1970, the child expects {want} (copying a file can change this time, too)",
                self.child.location, found.layer.location
            ));
        }
    }

    fn missing(&self, tried: &[String]) -> Error {
        let tried = match tried {
            [] => "among the images of its directory".to_owned(),
            tried => format!("at {}", tried.join(", ")),
        };
        Error::new(Code::ParentMissing, format!("the parent was not found {tried}"))
            .image(&self.child.location)
            .found(format!("a child of {}", self.parent.describe()))
            .hint("name the parent with --parent FILE")
    }
}

/// What no format claims may be an image whose header is damaged, or of a format that we do not know: writing to it as
/// raw would destroy it.
fn not_known_to_be_raw(at: &Location) -> Error {
    Error::new(Code::FormatRequired, "the file has the marks of no format, and is written only if it is said to be raw")
        .image(at)
        .hint("if it is a raw disk, say so with -f raw; else name the format, to learn what is wrong with the image")
}

fn check_cycle(images: &[OpenedImage], found: &OpenedImage) -> Result<()> {
    let same = |image: &&OpenedImage| {
        image.layer.location == found.layer.location
            || matches!((image.storage.id(), found.storage.id()), (Some(a), Some(b)) if a == b)
    };
    match images.iter().find(same) {
        None => Ok(()),
        Some(image) => Err(cycle(&found.layer.location, &image.layer.location)),
    }
}

/// The image of the chain that `error` found locked: a chain that is open for writing keeps readers out, itself too.
fn locked_by<'a>(images: &'a [OpenedImage], error: &Error) -> Option<&'a OpenedImage> {
    let is_it = |image: &&OpenedImage| error.image_name() == Some(&image.layer.location.0);
    images.iter().filter(|_| error.code() == Code::Locked).find(is_it)
}

fn cycle(at: &Location, again: &Location) -> Error {
    Error::new(Code::Cycle, "the chain of parents comes back to itself")
        .image(at)
        .found(format!("it goes on to {again}, which is already in the chain"))
        .hint("one of the images names a wrong parent; name the right one with --parent FILE")
}

/// Opens an image alone, for `info`: no parent and no part is touched.
impl FormatRegistry {
    /// Opens the image at `name` without any other file.
    pub async fn open_alone(
        &self,
        resolver: &Arc<dyn Resolver>,
        name: &str,
        options: &ChainOptions,
    ) -> Result<OpenedImage> {
        let opened = resolver.open(name, &Asker::User, options.access(false)).await?;
        let (format, snapshot) = (options.format.as_deref(), options.snapshot.as_deref());
        self.open_image(resolver, opened, format, options, false, false, snapshot).await
    }
}
