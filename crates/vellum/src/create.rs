//! `create`: a new, empty image.

use crate::Vellum;
use vellum_core::{
    Code, CreateRequest, DiskTraits, Error, Location, OptionValues, Output, OutputMode, Result, block_on,
};

/// What image to make.
#[derive(Clone, Debug, Default)]
pub struct CreateDiskRequest {
    /// Where it goes.
    pub target: String,
    /// Its format.
    pub format: String,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Options of the driver: name and value.
    pub options: Vec<(String, String)>,
    /// Comment, geometry, identity.
    pub traits: DiskTraits,
    /// No random identities, no clock.
    pub reproducible: bool,
    /// Replace an existing target.
    pub force: bool,
}

impl Vellum {
    /// Makes an empty image, durable when this returns.
    pub fn create(&self, request: &CreateDiskRequest) -> Result<()> {
        let format = self.formats.by_name(&request.format)?;
        let target = Location(request.target.clone());
        if block_on(self.resolver.exists(&target))? && !request.force {
            return Err(Error::new(Code::Exists, "the target exists")
                .image(&target)
                .hint("use --force to overwrite it"));
        }
        let options =
            OptionValues::check(format.name(), format.create_options(), request.options.iter().cloned())?;
        let providers =
            crate::convert::providers(request.reproducible, format.name(), request.virtual_size, &options)?;
        let output = Output::new(self.resolver.clone(), target, OutputMode::Fresh);
        let create = CreateRequest {
            output: output.clone(),
            virtual_size: request.virtual_size,
            options,
            traits: request.traits.clone(),
            compress: false,
            level: None,
            providers,
        };
        let made = block_on(async {
            format.create(create).await?.finish().await?;
            output.put_in_place().await
        });
        if made.is_err() {
            block_on(output.discard());
        }
        made
    }
}
