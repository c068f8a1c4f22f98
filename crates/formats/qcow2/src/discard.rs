//! Giving space back (sheet section 5): entries that read as zeros, and what happens to the clusters that they named.
//!
//! | version 3 | the zero flag, or all subclusters zero; an entry that says nothing stays as it is without a parent |
//! | version 2 | no entry, without a parent; a child cannot say "zeros" |
//! | raw data file | zeros in the data file; the tables stay as they are |

use crate::entry::{ALL_ZERO, ZERO};
use crate::map::Qcow2Image;
use crate::reserve::squeezed;
use crate::write::{Entry, Spot};
use std::ops::Range;
use vellum_core::{Discarded, Result, TableChange, ZeroMode, bytes};

/// Lookups of one cluster: between load and lookup the cache may be squeezed, but not for ever.
const TRIES_MAX: u32 = 1000;

impl Qcow2Image {
    /// Makes the start of `range`, which consists of whole clusters, read as zeros.
    pub(crate) async fn clear(&self, range: Range<u64>) -> Result<Discarded> {
        self.check_overlap().await?;
        let has_parent = self.info.parent.is_some();
        let len = bytes::sub(range.end, range.start)?;
        if has_parent && self.header.version < 3 {
            return Ok(Discarded::Cannot(len));
        }
        if self.header.has_raw_data() {
            self.punch_data(&range).await?;
            return Ok(Discarded::Done(len));
        }
        for _ in 0..TRIES_MAX {
            let e = match self.spot(range.start)? {
                Spot::NoTable(gap) if !has_parent => return Ok(Discarded::Done(gap.min(len))),
                Spot::Miss(page) => {
                    self.load_page(page).await?;
                    continue;
                }
                Spot::Entry(e) => e,
                _ => self.entry_of(range.start).await?,
            };
            if let Some(done) = self.clear_page(&e, &range).await? {
                return Ok(Discarded::Done(done.min(len)));
            }
        }
        Err(squeezed())
    }

    /// Clears the entries of one page, from `first` on; `None` if the page is not in memory any more.
    async fn clear_page(&self, first: &Entry, range: &Range<u64>) -> Result<Option<u64>> {
        let Some(page) = self.tables.get(first.page) else { return Ok(None) };
        let mut content = Vec::new();
        let mut gone: Vec<Range<u64>> = Vec::new();
        let mut data: Vec<Range<u64>> = Vec::new();
        let (mut within, mut guest, mut changes) = (first.within, first.guest, false);
        while within < first.page_len && guest < range.end {
            let old = self.read_entry(&page, Entry { within, guest, ..*first })?;
            let (value, bitmap) = self.cleared(&old);
            changes |= (value, bitmap) != (old.value, old.bitmap);
            content.extend(value.to_be_bytes());
            if self.header.extended_l2() {
                content.extend(bitmap.to_be_bytes());
            }
            gone.extend(self.clusters_of(&old)?);
            let next = bytes::add(guest, self.cluster)?;
            if self.header.has_data_file() && self.own_cluster(&old)?.is_some() {
                data.push(guest..next.min(self.header.size));
            }
            within = bytes::add(within, self.entry_bytes())?;
            guest = next;
        }
        drop(page); // or the cache would have to copy it
        // What lies in a data file cannot be given to anybody else: it can go before the tables say so.
        for part in data {
            self.punch_data(&part).await?;
        }
        if changes {
            let change = TableChange { page: first.page, at: first.within, bytes: &content, rank: 1 };
            if !self.tables.update(&[change])? {
                return Ok(None);
            }
        }
        let alloc = &self.session()?.alloc;
        gone.into_iter().for_each(|clusters| alloc.release_after_flush(clusters));
        bytes::sub(guest, range.start).map(Some)
    }

    /// Entry and bitmap of a cluster that reads as zeros and has no place.
    fn cleared(&self, old: &Entry) -> (u64, u64) {
        let says_nothing = old.value == 0 && old.bitmap == 0;
        if self.header.version < 3 || says_nothing && self.info.parent.is_none() {
            (0, 0)
        } else if self.header.extended_l2() {
            (0, ALL_ZERO)
        } else {
            (ZERO, 0)
        }
    }

    async fn punch_data(&self, range: &Range<u64>) -> Result<()> {
        match self.storages.get(1) {
            Some(data) => data.zero(range.clone(), ZeroMode::MayUnmap).await,
            None => Ok(()),
        }
    }
}
