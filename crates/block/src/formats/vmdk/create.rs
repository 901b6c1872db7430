//! Making VMDK images.

use super::{
    descriptor::{Descriptor, MAX_DESCRIPTOR, NewDescriptor},
    sparse::{HEADER, Header, TABLE_ENTRIES, flag},
};
use crate::{
    Context, Error, Result,
    formats::{Creation, support},
    storage::{self, Location, Storage, StorageExt, StorageOptions},
};

/// Bytes of each extent of a split image.
const SPLIT: u64 = 2 << 30;
/// Sectors reserved for an embedded descriptor.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Sectors of a grain.
const GRAIN: u64 = 128;

pub(super) fn create(creation: Creation<'_>) -> Result<()> {
    let options = creation.options;
    let subformat = options.take("subformat").unwrap_or_else(|| "monolithicSparse".into());
    let adapter = options.take("adapter_type").unwrap_or_else(|| "ide".into());
    if !matches!(adapter.as_str(), "ide" | "lsilogic" | "buslogic" | "legacyESX") {
        return Err(Error::usage(format!("Unknown adapter type: '{adapter}'")));
    }
    let compat6 = options.take_bool("compat6")?.unwrap_or(false);
    let hardware_version = match (options.take("hwversion"), compat6) {
        (Some(version), true) if version != "undefined" => {
            return Err(Error::usage("compat6 cannot be enabled with hwversion set"));
        }
        (Some(version), false) if version != "undefined" => version,
        (_, true) => "6".into(),
        _ => "4".into(),
    };
    let tools_version = options.take("toolsversion").unwrap_or_else(|| "2147483647".into());
    let zeroed_grain = options.take_bool("zeroed_grain")?.unwrap_or(false);
    let (split, flat, compressed) = match subformat.as_str() {
        "monolithicSparse" => (false, false, false),
        "monolithicFlat" => (false, true, false),
        "twoGbMaxExtentSparse" => (true, false, false),
        "twoGbMaxExtentFlat" => (true, true, false),
        "streamOptimized" => (false, false, true),
        other => return Err(Error::usage(format!("Invalid subformat '{other}'"))),
    };
    if flat && creation.backing.is_some() {
        return Err(Error::usage("Flat image can't have backing file"));
    }
    if flat && zeroed_grain {
        return Err(Error::usage("Flat image can't enable zeroed grain"));
    }
    let quoted = |text: &str| text.contains(['"', '\n', '\r', '\0']);
    if quoted(&hardware_version) || quoted(&tools_version) {
        return Err(Error::usage("VMDK options cannot contain quotes or line ends"));
    }
    let size =
        creation.size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
    let parent = match &creation.backing {
        None => None,
        Some(backing) => {
            if backing.format.as_deref().is_some_and(|f| f != "vmdk") {
                return Err(Error::usage("Invalid backing file format: a VMDK image's must be vmdk"));
            }
            if quoted(&backing.name) {
                return Err(Error::usage(
                    "The name of a VMDK backing file cannot contain quotes or line ends",
                ));
            }
            let full = storage::join_name(creation.name, &backing.name);
            let cid =
                read_cid(&full).context(|| format!("Could not read the CID of backing file '{full}'"))?;
            Some((cid, backing.name.as_str()))
        }
    };
    let mut cid = [0; 4];
    support::random_bytes(&mut cid)?;
    // The highest bit stays clear so that no CID looks like "no parent".
    let cid = u32::from_le_bytes(cid) & 0x7fff_ffff;
    let file_name = creation.name.rsplit('/').next().unwrap_or(creation.name);
    let stem = file_name.strip_suffix(".vmdk").unwrap_or(file_name);
    if quoted(file_name) {
        return Err(Error::usage("The name of a VMDK image cannot contain quotes or line ends"));
    }
    let describe = |extents: &str| {
        NewDescriptor {
            cid,
            parent,
            create_type: &subformat,
            extents,
            hardware_version: &hardware_version,
            tools_version: &tools_version,
            adapter: &adapter,
            sectors: size / 512,
        }
        .text()
    };
    let layout = |sectors, embedded| Layout { sectors, embedded, compressed, zeroed_grain };
    if !split && !flat {
        // The descriptor lies within the only extent.
        let text = describe(&format!("RW {} SPARSE \"{file_name}\"\n", size / 512));
        if text.len() as u64 > DESCRIPTOR_SECTORS * 512 {
            return Err(Error::usage("The names in the VMDK descriptor are too long"));
        }
        layout(size / 512, true).write(&*creation.storage)?;
        creation.storage.write_at(text.as_bytes(), 512)?;
        return creation.storage.flush();
    }
    let mut lines = String::new();
    let (mut at, mut number) = (0, 0);
    while at < size || number == 0 {
        number += 1;
        let len = if split { (size - at).min(SPLIT) } else { size };
        let name = match (split, flat) {
            (true, true) => format!("{stem}-f{number:03}.vmdk"),
            (true, false) => format!("{stem}-s{number:03}.vmdk"),
            (false, _) => format!("{stem}-flat.vmdk"),
        };
        let file = creation.siblings.create(&name, if flat { len } else { 0 })?;
        if flat {
            lines.push_str(&format!("RW {} FLAT \"{name}\" 0\n", len / 512));
        } else {
            layout(len / 512, false).write(&*file)?;
            lines.push_str(&format!("RW {} SPARSE \"{name}\"\n", len / 512));
        }
        file.flush()?;
        at += len;
        if size == 0 {
            break;
        }
    }
    let text = describe(&lines);
    if text.len() > MAX_DESCRIPTOR {
        return Err(Error::usage("The disk needs too many 2 GiB extents for one VMDK descriptor"));
    }
    creation.storage.write_at(text.as_bytes(), 0)?;
    creation.storage.flush()
}

/// The CID of the image called `name`, without claiming it.
pub(super) fn read_cid(name: &str) -> Result<u32> {
    let options = StorageOptions { read_only: true, no_locks: true, ..StorageOptions::default() };
    let file = storage::open(&Location::parse(name)?, &options)?;
    Ok(super::read_descriptor(&*file)?.1.cid)
}

impl Descriptor {
    /// The text of a descriptor in bytes read from a file.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<(String, Self)> {
        let text = String::from_utf8_lossy(bytes).split('\0').next().unwrap_or_default().to_owned();
        let parsed = Descriptor::parse(&text)?;
        Ok((text, parsed))
    }
}

/// A sparse extent to be made.
struct Layout {
    sectors: u64,
    embedded: bool,
    compressed: bool,
    zeroed_grain: bool,
}

impl Layout {
    /// Writes header, directories and empty grain tables.
    fn write(&self, storage: &dyn Storage) -> Result<()> {
        let table_sectors = u64::from(TABLE_ENTRIES) * 4 / 512;
        let tables = self.sectors.div_ceil(GRAIN).div_ceil(u64::from(TABLE_ENTRIES));
        let directory_sectors = (tables * 4).div_ceil(512);
        let redundant = 1 + DESCRIPTOR_SECTORS;
        let directory = redundant + directory_sectors + table_sectors * tables;
        let overhead = (directory + directory_sectors + table_sectors * tables).next_multiple_of(GRAIN);
        if u32::try_from(overhead).is_err() {
            return Err(Error::unsupported(
                "The disk is too large for one VMDK extent; use a twoGbMaxExtent subformat",
            ));
        }
        let mut flags = flag::NEWLINES | flag::REDUNDANT;
        if self.compressed {
            flags |= flag::COMPRESSED | flag::MARKERS;
        }
        if self.zeroed_grain {
            flags |= flag::ZEROED_GRAIN;
        }
        let header = Header {
            version: match (self.compressed, self.zeroed_grain) {
                (true, _) => 3,
                (false, true) => 2,
                _ => 1,
            },
            flags,
            capacity: self.sectors,
            grain: GRAIN,
            descriptor: if self.embedded { (1, DESCRIPTOR_SECTORS) } else { (0, 0) },
            table_entries: TABLE_ENTRIES,
            redundant,
            directory,
            overhead,
            compression: u16::from(self.compressed),
        };
        storage.fill_zeroes(0, overhead * 512)?;
        for start in [redundant, directory] {
            let mut piece = Vec::with_capacity(1 << 16);
            for first in (0..tables).step_by(1 << 14) {
                piece.clear();
                for i in first..tables.min(first + (1 << 14)) {
                    piece.extend_from_slice(
                        &((start + directory_sectors + i * table_sectors) as u32).to_le_bytes(),
                    );
                }
                storage.write_at(&piece, start * 512 + first * 4)?;
            }
        }
        let bytes: [u8; HEADER] = header.encode();
        storage.write_at(&bytes, 0)?;
        storage.flush()
    }
}
