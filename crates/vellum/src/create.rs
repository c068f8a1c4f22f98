//! `create`: a new, empty image, or a child that shows its parent.

use crate::seed::Seed;
use crate::{Vellum, target};
use vellum_core::{
    ChainOptions, Code, CreateRequest, DiskTraits, Error, Location, OpenedImage, OptionValues, Output,
    OutputMode, ParentLink, Result, block_on,
};

/// What image to make.
#[derive(Clone, Default)]
pub struct CreateDiskRequest {
    /// Where it goes.
    pub target: String,
    /// Its format.
    pub format: String,
    /// Size of the disk in bytes; 0 with a parent is the parent's size.
    pub virtual_size: u64,
    /// Options of the driver: name and value.
    pub options: Vec<(String, String)>,
    /// Comment, geometry, identity.
    pub traits: DiskTraits,
    /// No random identities, no clock.
    pub reproducible: bool,
    /// Replace an existing target.
    pub force: bool,
    /// Make a child of this image.
    pub parent: Option<ParentRequest>,
}

/// The parent of a new image.
#[derive(Clone, Default)]
pub struct ParentRequest {
    /// Its place. The child names it relative to itself if the parent lies in the child's directory or below, else by
    /// its absolute place.
    pub place: String,
    /// How it and its own parents are opened, among other things its format.
    pub options: ChainOptions,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateReport {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// How the child names its parent.
    pub parent: Option<ParentReport>,
}

/// The parent of an image that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentReport {
    /// How the child names it.
    pub place: String,
    /// Its format.
    pub format: &'static str,
    /// It was read as raw because no format claims it.
    pub raw_by_default: bool,
    /// It lies in the child's directory or below, where images may name files without being allowed to.
    pub is_near: bool,
}

impl Vellum {
    /// Makes an empty image or a child, durable when this returns.
    pub fn create(&self, request: &CreateDiskRequest) -> Result<CreateReport> {
        let format = self.formats.by_name(&request.format)?;
        let target = Location(request.target.clone());
        let images = match &request.parent {
            Some(parent) => self.open(&parent.place, &parent.options)?.1,
            None => Vec::new(),
        };
        let mode = target::mode(self.resolver.as_ref(), &target, request.force, &images)?;
        let options =
            OptionValues::check(format.name(), format.create_options(), request.options.iter().cloned())?;
        let parent = images.first().map(|parent| self.link(&target, parent));
        let virtual_size = match (&parent, request.virtual_size) {
            (Some((link, _)), 0) => link.virtual_size,
            (_, size) => size,
        };
        let seed = match request.reproducible {
            true => {
                // Two children of different parents must not be taken for each other.
                let of = parent.as_ref().map_or(String::new(), |(link, _)| format!("{:?}", link.identity));
                Seed::reproducible(format.name(), virtual_size, &options, of.as_bytes())
            }
            false => Seed::random()?,
        };
        let is_device = mode == OutputMode::Device;
        if is_device {
            target::wipe(self.resolver.as_ref(), &target)?;
        }
        let output = Output::new(self.resolver.clone(), target, mode);
        output.protect(target::storage_ids(&images));
        let create = CreateRequest {
            output: output.clone(),
            virtual_size,
            options,
            traits: request.traits.clone(),
            compress: false,
            level: None,
            providers: seed.providers(),
            parent: parent.as_ref().map(|(link, _)| link.clone()),
        };
        let made = block_on(async { format.create(create).await?.finish().await })
            .and_then(|()| target::check_siblings(self.resolver.as_ref(), &output, request.force, &images))
            .and_then(|()| block_on(output.put_in_place()));
        if let Err(error) = made {
            block_on(output.discard());
            return Err(error);
        }
        let made = if is_device { Vec::new() } else { output.final_locations() };
        // Its files are locked as long as they are open for writing.
        drop(output);
        if let Some(parent) = &request.parent
            && let Err(error) = self.check_child(request, parent)
        {
            for location in made {
                // It was made a moment ago and is of no use; that it is still there would be the smaller trouble.
                let _ = block_on(self.resolver.delete(&location));
            }
            return Err(error);
        }
        let parent = parent.zip(images.first()).map(|((link, is_near), image)| ParentReport {
            place: link.place,
            format: link.format,
            raw_by_default: image.raw_by_default,
            is_near,
        });
        Ok(CreateReport { virtual_size, parent })
    }

    /// How the image at `target` is to name `parent`, and whether that lies in its directory or below.
    fn link(&self, target: &Location, parent: &OpenedImage) -> (ParentLink, bool) {
        let absolute = parent.layer.location.0.clone();
        let near = self.resolver.relative(target, &parent.layer.location);
        let info = parent.layer.image.info();
        let modified_ns = parent.storage.modified_ns();
        let link = ParentLink {
            place: near.clone().unwrap_or_else(|| absolute.clone()),
            absolute,
            format: parent.format.name(),
            virtual_size: info.virtual_size,
            identity: info.identity,
            modified_unix: modified_ns.and_then(|ns| u64::try_from(ns / 1_000_000_000).ok()),
        };
        (link, near.is_some())
    }

    /// Opens the new child over its parent: a driver that forgets the parent, or an identity that does not match, must
    /// not be found out when the child holds data.
    fn check_child(&self, request: &CreateDiskRequest, parent: &ParentRequest) -> Result<()> {
        let format = Some(request.format.clone());
        let parents = std::iter::once(Location(parent.place.clone())).chain(parent.options.parents.clone());
        let options = ChainOptions {
            format,
            parents: parents.collect(),
            probe_parents: true,
            ..parent.options.clone()
        };
        let opened = self.open(&request.target, &options);
        let (_, images) = opened.map_err(|error| error.context("opening the new child over its parent"))?;
        match images.len() {
            0 | 1 => Err(Error::new(Code::Feature, "this variant does not name a parent")
                .image(&request.target)
                .format(images.first().map_or("", |image| image.format.name()))
                .hint("make the child in another format or variant, such as qcow2")),
            _ => Ok(()),
        }
    }
}
