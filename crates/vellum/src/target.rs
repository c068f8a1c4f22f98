//! Where a new image goes: whether that may be overwritten, and how.

use vellum_core::{
    Access, Asker, Code, Error, Location, OpenedImage, Output, OutputMode, Resolver, Result, StorageId,
    ZeroMode, block_on,
};

/// How `target` is written. `images` are the source, of which it must not be a part.
pub(crate) fn mode(
    resolver: &dyn Resolver,
    target: &Location,
    force: bool,
    images: &[OpenedImage],
) -> Result<OutputMode> {
    if !block_on(resolver.exists(target))? {
        return Ok(OutputMode::Fresh);
    }
    check_not_source(resolver, target, images)?;
    if !force {
        return Err(exists(target));
    }
    // Only what is open for writing tells whether its length can change: a device's cannot.
    let existing =
        block_on(resolver.open(&target.0, &Asker::User, Access { write: true, ..Access::default() }))?;
    Ok(if existing.storage.limits().resizable { OutputMode::Fresh } else { OutputMode::Device })
}

/// Makes a device read as zeros, as the files of a new image do. Before anything is written to it.
pub(crate) fn wipe(resolver: &dyn Resolver, target: &Location) -> Result<()> {
    block_on(async {
        let storage = resolver
            .open(&target.0, &Asker::User, Access { write: true, ..Access::default() })
            .await?
            .storage;
        storage.zero(0..storage.len()?, ZeroMode::MayUnmap).await
    })
    .map_err(|error| error.image(target).context("wiping the target"))
}

/// Checks the files beside the main one (extents) that the new image consists of: they are replaced when it is put in
/// place, so the same holds for them as for the main one. Called when they are made, and again before they are put in
/// place, because some variants make them on the way.
pub(crate) fn check_siblings(
    resolver: &dyn Resolver,
    output: &Output,
    force: bool,
    images: &[OpenedImage],
) -> Result<()> {
    for location in output.final_locations().iter().filter(|location| *location != output.location()) {
        if block_on(resolver.exists(location))? {
            check_not_source(resolver, location, images)?;
            if !force {
                return Err(exists(location).context("making the files of the new image"));
            }
        }
    }
    Ok(())
}

/// Refuses `location` if it is one of the files of the source.
pub(crate) fn check_not_source(
    resolver: &dyn Resolver,
    location: &Location,
    images: &[OpenedImage],
) -> Result<()> {
    if images.is_empty() || !block_on(resolver.exists(location))? {
        return Ok(());
    }
    let existing = block_on(resolver.open(&location.0, &Asker::User, Access::default()));
    let existing = existing.map_err(|error| match error.code() {
        // It is only looked at here, but it is to be overwritten: no way of reading it all the same would help.
        Code::Locked => error
            .replace_hint("wait until that has ended, or choose another target; nothing was changed")
            .context("looking at the target, which is to be overwritten"),
        _ => error,
    })?;
    if existing.storage.id().is_some_and(|id| storage_ids(images).contains(&id)) {
        return Err(Error::new(Code::Usage, "the target is part of the source")
            .image(location)
            .hint("choose another target; rename it afterwards"));
    }
    Ok(())
}

/// Identities of all files of the source.
pub(crate) fn storage_ids(images: &[OpenedImage]) -> Vec<StorageId> {
    let parts = |image: &OpenedImage| -> Vec<StorageId> {
        let storages = image.layer.image.storages().iter();
        storages.filter_map(|storage| storage.id()).chain(image.storage.id()).collect()
    };
    images.iter().flat_map(parts).collect()
}

fn exists(target: &Location) -> Error {
    Error::new(Code::Exists, "the target exists and its content would be lost")
        .image(target)
        .hint("use --force to overwrite it")
}
