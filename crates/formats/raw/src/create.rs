//! New raw images: a file of the right length, and blocks at their own offsets.

use std::sync::Arc;
use vellum_core::{
    BoxFuture, Code, CreateRequest, Error, ImageWriter, MetaWrite, OptionKind, OptionSpec, Payload, Place,
    Preallocate, Result, Storage, WriterShape, bytes, set_len,
};

/// The unit of placement. Nothing in the file depends on it.
const BLOCK_SIZE: u64 = 1 << 20;

/// The options of `create`.
pub(crate) const OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "preallocation",
    kind: OptionKind::OneOf(&["off", "falloc", "full"]),
    default: "off",
    expert: false,
    help: "reserve the space of the whole disk: falloc without writing it, full by writing zeros",
}];

struct RawWriter {
    shape: WriterShape,
    storages: [Arc<dyn Storage>; 1],
    virtual_size: u64,
}

/// Begins a raw image: the file gets its final length at once.
///
/// # Errors
/// `USAGE` for compression and parents, `NO_SPACE` and `IO` from the storage.
pub(crate) async fn create(request: CreateRequest) -> Result<Box<dyn ImageWriter>> {
    if request.compress {
        return Err(Error::new(Code::Usage, "raw images cannot be compressed")
            .image(request.output.location())
            .hint("leave compression out, or choose a format that has it (qcow2, vmdk streamOptimized)"));
    }
    if let Some(parent) = &request.parent {
        return Err(Error::new(Code::Usage, "a raw image holds every byte itself; it cannot have a parent")
            .image(request.output.location())
            .found(&parent.place)
            .hint("make the child in another format, such as qcow2"));
    }
    let preallocate = match request.options.text("preallocation", "off") {
        "falloc" => Preallocate::Falloc,
        "full" => Preallocate::Full,
        _ => Preallocate::Off,
    };
    let main = request.output.main().await?;
    set_len(main.as_ref(), request.virtual_size, preallocate).await?;
    let shape = WriterShape { block_size: BLOCK_SIZE, codec: None, encoded_limit: 0 };
    Ok(Box::new(RawWriter { shape, storages: [main], virtual_size: request.virtual_size }))
}

impl ImageWriter for RawWriter {
    fn shape(&self) -> &WriterShape {
        &self.shape
    }
    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }
    fn place(&mut self, block: u64, payload: Payload, _writes: &mut Vec<MetaWrite>) -> Result<Place> {
        let offset = bytes::mul(block, BLOCK_SIZE)?;
        if offset >= self.virtual_size || payload != Payload::Data {
            return Err(Error::new(Code::Usage, "raw images take plain blocks inside the disk").found(block));
        }
        Ok(Place { storage: 0, offset })
    }
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
