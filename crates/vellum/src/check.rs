//! `check`: whether an image is what its format says.

use crate::Vellum;
use std::sync::Arc;
use vellum_core::{
    Access, Asker, ChainOptions, CheckReport, CheckRequest, Location, Resolver, Result, Storage, block_on,
};

/// An image that was checked.
pub(crate) struct Checked {
    /// Without its storages: whoever keeps it must not keep the files open, and locked.
    pub report: CheckReport,
    /// The files of the image.
    pub storages: Vec<Arc<dyn Storage>>,
    /// The file that was named.
    pub storage: Arc<dyn Storage>,
    pub location: Location,
}

impl Vellum {
    /// Checks one image, without its parents. Changes nothing. The report's `storages` are empty.
    ///
    /// # Errors
    /// Where nothing can be said: the file cannot be read, or its format has nothing to check.
    pub fn check(&self, name: &str, options: &ChainOptions) -> Result<CheckReport> {
        self.examine(name, options, self.resolver.clone(), Access::default(), false)
            .map(|checked| checked.report)
    }

    /// Checks the image; with `plan`, says also what would mend it. Its parts are opened by `resolver`.
    pub(crate) fn examine(
        &self,
        name: &str,
        options: &ChainOptions,
        resolver: Arc<dyn Resolver>,
        access: Access,
        plan: bool,
    ) -> Result<Checked> {
        block_on(async {
            let opened = resolver.open(name, &Asker::User, access).await?;
            let (format, by_default) = match &options.format {
                Some(format) => (self.formats.by_name(format)?, false),
                None => {
                    let probe = self.formats.probe(opened.storage.as_ref()).await?;
                    (probe.format, probe.by_default)
                }
            };
            let request = CheckRequest {
                storage: opened.storage.clone(),
                location: opened.location.clone(),
                resolver,
                limits: options.limits,
                events: options.events.clone(),
                plan,
            };
            let format_name = format.name();
            let checked = format.check(request).await.map_err(|error| match by_default {
                true => error.hint(
                    "it has the marks of no format; if they are damaged, name the format with -f FORMAT",
                ),
                false => error.format(format_name).context(format!("checking {name} as {format_name}")),
            });
            let mut report = checked?;
            report.format = format_name;
            let storages = std::mem::take(&mut report.storages);
            Ok(Checked { report, storages, storage: opened.storage, location: opened.location })
        })
    }
}
