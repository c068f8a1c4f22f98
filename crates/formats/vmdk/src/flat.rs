//! Laying out flat disks: raw bytes in one file or several, and a descriptor beside them.

use crate::create::{FLAT_BLOCK, Plan, wrong_block, wrong_payload};
use std::sync::Arc;
use vellum_core::bytes::{add, div, index, mul, rem, wide};
use vellum_core::storage::write_slice;
use vellum_core::{
    BoxFuture, ImageWriter, MetaWrite, Payload, Place, Preallocate, Result, Storage, WriterShape, set_len,
};

/// Writer of monolithicFlat, twoGbMaxExtentFlat and vmfs.
pub(crate) struct FlatWriter {
    plan: Plan,
    shape: WriterShape,
    /// The descriptor, then the extents.
    storages: Vec<Arc<dyn Storage>>,
}

impl FlatWriter {
    /// Makes the files.
    pub(crate) async fn begin(plan: Plan) -> Result<Self> {
        let mut storages = vec![plan.output.main().await?];
        for extent in &plan.descriptor.extents {
            storages.push(plan.output.sibling(&extent.name).await?);
        }
        let shape = WriterShape { block_size: FLAT_BLOCK, codec: None, encoded_limit: 0 };
        Ok(FlatWriter { plan, shape, storages })
    }
}

impl ImageWriter for FlatWriter {
    fn shape(&self) -> &WriterShape {
        &self.shape
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn place(&mut self, block: u64, payload: Payload, _writes: &mut Vec<MetaWrite>) -> Result<Place> {
        if payload != Payload::Data {
            return Err(wrong_payload());
        }
        let at = mul(block, FLAT_BLOCK)?;
        if at >= self.plan.size {
            return Err(wrong_block(block));
        }
        let extent = div(at, self.plan.extent_bytes)?;
        Ok(Place { storage: index(add(extent, 1)?)?, offset: rem(at, self.plan.extent_bytes)? })
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            let mut storages = self.storages.iter();
            let main = storages.next();
            for (extent, storage) in self.plan.descriptor.extents.iter().zip(storages) {
                let bytes = mul(extent.sectors, crate::header::SECTOR)?;
                set_len(storage.as_ref(), bytes, Preallocate::Off).await?;
            }
            if let Some(main) = main {
                let text = self.plan.descriptor.print();
                write_slice(main.as_ref(), 0, text.as_bytes()).await?;
                set_len(main.as_ref(), wide(text.len()), Preallocate::Off).await?;
            }
            Ok(())
        })
    }
}
