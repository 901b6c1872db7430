//! Changing creation options of an existing image.

use super::{COMPRESSED, COPIED, Meta, OFFSET, Qcow2, ZERO, header};
use crate::{Error, Options, Result, formats::{Amending, Backing}, storage::StorageExt};
use std::sync::atomic::Ordering;

impl Qcow2 {
    pub(super) fn amend_options(&self, options: &mut Options, context: &Amending<'_>) -> Result<()> {
        self.amend_keys(options, context)?;
        let version = match options.take("compat").as_deref() {
            None => None,
            Some("1.1" | "v3") => Some(3),
            Some("0.10" | "v2") => Some(2),
            Some(other) => return Err(Error::usage(format!("Unknown compatibility level {other}"))),
        };
        let lazy = options.take_bool("lazy_refcounts")?;
        let width = options.take_number("refcount_bits")?;
        let size = options.take_size("size")?;
        let raw = options.take_bool("data_file_raw")?;
        let data_file = options.take("data_file");
        let (backing_name, backing_format) = (options.take("backing_file"), options.take("backing_fmt"));
        for fixed in [
            "cluster_size",
            "preallocation",
            "encryption",
            "extended_l2",
            "compression_type",
        ] {
            if options.take(fixed).is_some() {
                return Err(Error::unsupported(format!("Invalid parameter '{fixed}': it cannot be amended")));
            }
        }
        if let Some(bits) = width
            && (bits > 64 || !bits.is_power_of_two())
        {
            return Err(Error::usage("Refcount width must be a power of two and may not exceed 64 bits"));
        }
        let current = self.lock().header.version;
        let target = version.unwrap_or(current);
        if version == Some(3) && current < 3 {
            self.upgrade()?;
        }
        if let Some(bits) = width {
            if target < 3 && bits != 16 {
                return Err(Error::usage(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
                ));
            }
            let mut meta = self.lock();
            let order = bits.trailing_zeros();
            if order != meta.header.refcount_order {
                self.change_refcount_width(&mut meta, order)?;
            }
        }
        if let Some(lazy) = lazy {
            if target < 3 {
                return Err(Error::usage(
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
                ));
            }
            self.change_header(|h| {
                h.compatible = h.compatible & !header::LAZY_REFCOUNTS | u64::from(lazy);
                Ok(())
            })?;
        }
        if let Some(raw) = raw {
            self.change_header(|h| {
                if raw && h.autoclear & header::RAW_DATA_FILE == 0 {
                    return Err(Error::usage("data-file-raw cannot be set on existing images"));
                }
                if !raw {
                    h.autoclear &= !header::RAW_DATA_FILE;
                }
                Ok(())
            })?;
        }
        if let Some(name) = data_file {
            self.change_header(|h| {
                if h.incompatible & header::DATA_FILE == 0 {
                    return Err(Error::usage(
                        "data-file can only be set for images that use an external data file",
                    ));
                }
                h.data_file = (!name.is_empty()).then(|| name.clone());
                Ok(())
            })?;
        }
        if backing_name.is_some() || backing_format.is_some() {
            let old = self.lock().header.backing.clone();
            let name = backing_name.or_else(|| old.as_ref().map(|b| b.name.clone())).unwrap_or_default();
            let format = backing_format.or_else(|| old.and_then(|b| b.format));
            if old_differs(&self.lock(), &name) {
                return Err(Error::unsupported("Cannot amend the backing file; use qemu-img rebase instead"));
            }
            self.change_backing((!name.is_empty()).then_some(Backing { name, format }).as_ref())?;
        }
        if let Some(size) = size {
            self.set_disk_size(size, Default::default())?;
        }
        if version == Some(2) && current >= 3 {
            self.downgrade()?;
        }
        Ok(())
    }

    fn change_header(&self, f: impl FnOnce(&mut header::Header) -> Result<()>) -> Result<()> {
        let mut meta = self.lock();
        let mut header = meta.header.clone();
        f(&mut header)?;
        header.encode()?;
        self.write_meta(&mut meta)?;
        header.write(&**self.main())?;
        meta.header = header;
        self.main().flush()
    }

    fn upgrade(&self) -> Result<()> {
        self.change_header(|h| {
            h.version = 3;
            Ok(())
        })
    }

    /// Makes a version 2 image of it, where nothing in it needs version 3.
    fn downgrade(&self) -> Result<()> {
        let mut meta = self.lock();
        let h = &meta.header;
        let refuse = |why: &str| Err(Error::usage(format!("Cannot downgrade an image with {why}")));
        if h.refcount_order != 4 {
            return Err(Error::usage("compat=0.10 requires refcount_bits=16"));
        }
        if h.incompatible & header::DATA_FILE != 0 {
            return refuse("a data file");
        }
        if h.incompatible & header::EXTENDED_L2 != 0 {
            return refuse("extended L2 entries");
        }
        if h.incompatible & header::COMPRESSION != 0 {
            return refuse("a compression type other than zlib");
        }
        if h.bitmaps.is_some() {
            return refuse("bitmaps");
        }
        if meta
            .snapshots
            .iter()
            .any(|s| s.info.vm_state_size > u64::from(u32::MAX) || s.info.disk_size != h.size)
        {
            return Err(Error::usage("Internal snapshots prevent downgrade of image"));
        }
        if !meta.snapshots.is_empty() {
            // Zero entries may hide in their tables, which are not expanded here.
            return refuse("internal snapshots; delete them first");
        }
        self.expand_zeros(&mut meta)?;
        self.write_meta(&mut meta)?;
        self.write_refcounts(&mut meta)?;
        meta.header.version = 2;
        meta.header.incompatible = 0;
        meta.header.compatible = 0;
        meta.header.autoclear = 0;
        meta.dirty_marked = false;
        meta.header.write(&**self.main())?;
        self.main().flush()
    }

    /// Replaces zero entries by absent or by zero-filled clusters.
    fn expand_zeros(&self, meta: &mut Meta) -> Result<()> {
        let size = self.disk_size();
        let backed = self.has_backing.load(Ordering::Relaxed);
        let bits = self.geo.cluster_bits;
        let span = self.geo.cluster_size * self.geo.l2_entries;
        let mut at = 0;
        while at < size {
            if self.l1_entry(at) & OFFSET == 0 {
                at = (at - at % span) + span;
                continue;
            }
            let (slice, word) = self.slice_for(self.l1_entry(at) & OFFSET, at)?;
            let entry = slice.get(word);
            if entry & COMPRESSED == 0 && entry & ZERO != 0 {
                let mut host = entry & OFFSET;
                if host == 0 && backed {
                    host = self.allocate(meta, 1)?.0 << bits;
                }
                if host != 0 {
                    self.main().fill_zeroes(host, self.geo.cluster_size)?;
                }
                let table = self.table_for_write(meta, at)?;
                let (slice, word) = self.slice_for(table, at)?;
                self.tables.set(&slice, word, if host == 0 { 0 } else { host | COPIED });
            }
            at += self.geo.cluster_size;
        }
        Ok(())
    }
}

fn old_differs(meta: &Meta, name: &str) -> bool {
    meta.header.backing.as_ref().map_or("", |b| &b.name) != name
}
