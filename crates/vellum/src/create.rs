//! `create`: a new, empty image.

use crate::{Vellum, target};
use vellum_core::{CreateRequest, DiskTraits, Location, OptionValues, Output, OutputMode, Result, block_on};

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
        let mode = target::mode(self.resolver.as_ref(), &target, request.force, &[])?;
        let options =
            OptionValues::check(format.name(), format.create_options(), request.options.iter().cloned())?;
        let providers =
            crate::convert::providers(request.reproducible, format.name(), request.virtual_size, &options)?;
        if mode == OutputMode::Device {
            target::wipe(self.resolver.as_ref(), &target)?;
        }
        let output = Output::new(self.resolver.clone(), target, mode);
        let create = CreateRequest {
            output: output.clone(),
            virtual_size: request.virtual_size,
            options,
            traits: request.traits.clone(),
            compress: false,
            level: None,
            providers,
            parent: None,
        };
        let made = block_on(async { format.create(create).await?.finish().await })
            .and_then(|()| target::check_siblings(self.resolver.as_ref(), &output, request.force, &[]))
            .and_then(|()| block_on(output.put_in_place()));
        if made.is_err() {
            block_on(output.discard());
        }
        made
    }
}
