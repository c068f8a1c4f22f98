//! Internal snapshots: states of a disk that an image keeps inside itself.

use crate::Vellum;
use vellum_core::{
    Access, Asker, BoxFuture, ChainOptions, Code, Error, Image, Kind, OpenedImage, Providers, Result,
    SnapshotInfo, Snapshots, block_on,
};

impl Vellum {
    /// The snapshots of an image, oldest first.
    ///
    /// # Errors
    /// `FEATURE` if its format has no internal snapshots.
    pub fn snapshots(&self, name: &str, options: &ChainOptions) -> Result<Vec<SnapshotInfo>> {
        let opened = self.open_alone(name, options)?;
        block_on(snapshots_of(&opened)?.list()).map_err(|error| error.image(name))
    }

    /// Keeps the present state of the image under `snapshot`.
    pub fn create_snapshot(
        &self,
        name: &str,
        options: &ChainOptions,
        snapshot: &str,
    ) -> Result<SnapshotInfo> {
        let now_unix = Providers::system()?.unix_time;
        self.change_snapshots(name, options, |all| all.create(snapshot.to_owned(), now_unix))
            .map_err(|error| error.context(format!("making the snapshot {snapshot:?}")))
    }

    /// Makes the disk what it was in `snapshot` (id or name). **What it is now is lost.**
    pub fn apply_snapshot(&self, name: &str, options: &ChainOptions, snapshot: &str) -> Result<()> {
        self.change_snapshots(name, options, |all| all.apply(snapshot.to_owned()))
            .map_err(|error| error.context(format!("applying the snapshot {snapshot:?}")))
    }

    /// Deletes `snapshot` (id or name).
    pub fn delete_snapshot(&self, name: &str, options: &ChainOptions, snapshot: &str) -> Result<()> {
        self.change_snapshots(name, options, |all| all.delete(snapshot.to_owned()))
            .map_err(|error| error.context(format!("deleting the snapshot {snapshot:?}")))
    }

    /// Opens the image for writing and lets `change` do its work in a session of its own.
    fn change_snapshots<T>(
        &self,
        name: &str,
        options: &ChainOptions,
        change: impl for<'a> FnOnce(&'a dyn Snapshots) -> BoxFuture<'a, Result<T>>,
    ) -> Result<T> {
        block_on(async {
            let opened =
                self.resolver.open(name, &Asker::User, Access { write: true, ..Access::default() }).await?;
            let (format, resolver) = (options.format.as_deref(), &self.resolver);
            let opened = self.formats.open_image(resolver, opened, format, options, true, true, None).await?;
            let image: &dyn Image = opened.layer.image.as_ref();
            let snapshots = snapshots_of(&opened)?;
            let Some(writable) = image.writable() else {
                return Err(Error::new(Code::Permission, "the image cannot be written").image(name));
            };
            writable.begin().await?;
            let changed = change(snapshots).await;
            let has_stopped = matches!(&changed, Err(error) if error.kind() == Kind::Io);
            if !has_stopped {
                // After a failed write the marks stay: they say that the image wants to be checked.
                writable.close().await?;
            }
            changed.map_err(|error| error.image(name))
        })
    }
}

fn snapshots_of(opened: &OpenedImage) -> Result<&dyn Snapshots> {
    let format = opened.format.name();
    opened.layer.image.snapshots().ok_or_else(|| {
        Error::new(Code::Feature, format!("{format} images keep no snapshots inside themselves"))
            .image(&opened.layer.location)
            .hint("keep a state by making a child: `vellum create --parent IMAGE CHILD`; or convert to qcow2")
    })
}
