//! The qcow2 header and its extensions (QEMU's `docs/interop/qcow2.txt`, "Header").

use crate::{Error, Result, formats::Backing, storage::Storage, storage::StorageExt};

/// `QFI\xfb`.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Incompatible feature: refcounts may be wrong.
pub(super) const DIRTY: u64 = 1;
/// Incompatible feature: metadata is damaged.
pub(super) const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in another file.
pub(super) const DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: the compression type field says something other than zlib.
pub(super) const COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries are 128 bits, with subclusters.
pub(super) const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Compatible feature: refcounts may be written late.
pub(super) const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature: the bitmaps extension is consistent.
pub(super) const BITMAPS: u64 = 1;
/// Autoclear feature: the external data file can be read as raw.
pub(super) const RAW_DATA_FILE: u64 = 1 << 1;
const KNOWN_AUTOCLEAR: u64 = BITMAPS | RAW_DATA_FILE;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// Largest L1 table: 32 MiB, QEMU's limit.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table: 8 MiB, QEMU's limit.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most snapshots, QEMU's limit.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;

/// The bitmaps extension.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BitmapsHeader {
    pub(super) count: u32,
    pub(super) directory_size: u64,
    pub(super) directory_offset: u64,
}

/// Header fields, with extensions taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) crypt_method: u32,
    pub(super) l1_size: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    pub(super) snapshot_count: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    pub(super) refcount_order: u32,
    pub(super) compression: u8,
    pub(super) backing: Option<Backing>,
    pub(super) bitmaps: Option<BitmapsHeader>,
    pub(super) crypto: Option<(u64, u64)>,
    pub(super) data_file: Option<String>,
    /// Extensions nobody here knows, kept when the header is rewritten.
    pub(super) unknown_extensions: Vec<(u32, Vec<u8>)>,
    /// Header bytes between the fields known here and the length the header gives for itself.
    pub(super) unknown_fields: Vec<u8>,
}

fn be32(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_be_bytes(v)
}

fn be64(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_be_bytes(v)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Header {
    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_size(&self) -> u64 {
        if self.incompatible & EXTENDED_L2 != 0 { 16 } else { 8 }
    }

    /// Guest bytes that one L2 table maps.
    pub(super) fn l2_coverage(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size() * self.cluster_size()
    }

    /// Reads and checks the header.
    pub(super) fn read(storage: &dyn Storage, read_only: bool, for_check: bool) -> Result<Header> {
        let fixed = storage.read_vec(0, 112)?;
        if fixed[..4] != MAGIC {
            return Err(Error::invalid("Image is not in qcow2 format"));
        }
        let version = be32(&fixed, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = be32(&fixed, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::invalid(format!("Unsupported cluster size: 2^{cluster_bits}")));
        }
        let v3 = version >= 3;
        let at3 = |at: usize| if v3 { be64(&fixed, at) } else { 0 };
        let header_length = if v3 { be32(&fixed, 100) } else { 72 };
        if v3 && header_length < 104 {
            return Err(Error::invalid("qcow2 header too short"));
        }
        let cluster_size = 1u64 << cluster_bits;
        if u64::from(header_length) > cluster_size {
            return Err(Error::invalid("qcow2 header exceeds cluster size"));
        }
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(&fixed, 24),
            crypt_method: be32(&fixed, 32),
            l1_size: be32(&fixed, 36),
            l1_offset: be64(&fixed, 40),
            reftable_offset: be64(&fixed, 48),
            reftable_clusters: be32(&fixed, 56),
            snapshot_count: be32(&fixed, 60),
            snapshots_offset: be64(&fixed, 64),
            incompatible: at3(72),
            compatible: at3(80),
            autoclear: at3(88),
            refcount_order: if v3 { be32(&fixed, 96) } else { 4 },
            compression: if v3 && header_length > 104 { fixed[104] } else { 0 },
            backing: None,
            bitmaps: None,
            crypto: None,
            data_file: None,
            unknown_extensions: Vec::new(),
            unknown_fields: Vec::new(),
        };
        if header_length > 112 {
            header.unknown_fields = storage.read_vec(112, header_length as usize - 112)?;
        }
        let backing_offset = be64(&fixed, 8);
        let backing_size = be32(&fixed, 16);
        if backing_offset > cluster_size {
            return Err(Error::invalid("Invalid backing file offset"));
        }
        let extensions_end = if backing_offset != 0 { backing_offset } else { cluster_size };
        let names = header.read_extensions(storage, u64::from(header_length), extensions_end)?;
        header.check_features(&names)?;
        if backing_offset != 0 {
            if backing_size > 1023 || backing_size as u64 > cluster_size - backing_offset {
                return Err(Error::invalid("Backing file name too long"));
            }
            let name = text(&storage.read_vec(backing_offset, backing_size as usize)?);
            let format = header.backing.take().and_then(|b| b.format);
            header.backing = (!name.is_empty()).then_some(Backing { name, format });
        } else {
            header.backing = None;
        }
        header.check_fields(read_only, for_check)?;
        Ok(header)
    }

    /// Reads the extensions; the result is the feature name table.
    fn read_extensions(&mut self, storage: &dyn Storage, start: u64, end: u64) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = start;
        while at + 8 <= end {
            let head = storage.read_vec(at, 8)?;
            let (kind, len) = (be32(&head, 0), u64::from(be32(&head, 4)));
            at += 8;
            if len > end - at {
                return Err(Error::invalid("Header extension too large"));
            }
            if kind == EXT_END {
                break;
            }
            let data = storage.read_vec(at, len as usize)?;
            match kind {
                EXT_BACKING_FORMAT => {
                    self.backing = Some(Backing { name: String::new(), format: Some(text(&data)) });
                }
                EXT_FEATURE_NAMES => names = data,
                EXT_CRYPTO if self.crypt_method == 2 => {
                    if len != 16 {
                        return Err(Error::invalid(format!(
                            "CRYPTO header extension size {len}, but expected size 16"
                        )));
                    }
                    self.crypto = Some((be64(&data, 0), be64(&data, 8)));
                }
                EXT_BITMAPS if self.version >= 3 => {
                    if len != 24 {
                        return Err(Error::invalid("bitmaps_ext: Invalid extension length"));
                    }
                    if self.autoclear & BITMAPS != 0 {
                        self.bitmaps = Some(BitmapsHeader {
                            count: be32(&data, 0),
                            directory_size: be64(&data, 8),
                            directory_offset: be64(&data, 16),
                        });
                    }
                }
                EXT_DATA_FILE => self.data_file = Some(text(&data)),
                _ => self.unknown_extensions.push((kind, data)),
            }
            at += len.next_multiple_of(8);
        }
        Ok(names)
    }

    /// Refuses features that must be understood and are not.
    fn check_features(&self, names: &[u8]) -> Result<()> {
        let unknown = self.incompatible & !KNOWN_INCOMPATIBLE;
        if unknown == 0 {
            return Ok(());
        }
        let mut list = Vec::new();
        for bit in (0..64).filter(|b| unknown & (1 << b) != 0) {
            let name = names.chunks_exact(48).find(|e| e[0] == 0 && u32::from(e[1]) == bit);
            list.push(match name {
                Some(e) => text(e[2..].split(|&b| b == 0).next().unwrap_or_default()),
                None => format!("Unknown incompatible feature: {:x}", 1u64 << bit),
            });
        }
        Err(Error::unsupported(format!("Unsupported qcow2 feature(s): {}", list.join(", "))))
    }

    fn check_fields(&self, read_only: bool, for_check: bool) -> Result<()> {
        let bad = |what: &str| Err(Error::invalid(what));
        if self.incompatible & CORRUPT != 0 && !read_only && !for_check {
            return Err(Error::Corrupt("qcow2: Image is corrupt; cannot be opened read/write".into()));
        }
        if self.refcount_order > 6 {
            return bad("Reference count entry width too large; may not exceed 64 bits");
        }
        if self.crypt_method > 2 {
            return Err(Error::unsupported(format!("Unsupported encryption method {}", self.crypt_method)));
        }
        if self.crypt_method == 2 && self.crypto.is_none() {
            return bad("CRYPTO header extension missing");
        }
        match (self.incompatible & COMPRESSION != 0, self.compression) {
            (false, 0) | (true, 1) => {}
            (false, _) | (true, 0) => {
                return bad("qcow2: Compression type incompatible feature bit must match the type");
            }
            (true, n) => return Err(Error::unsupported(format!("qcow2: unknown compression type: {n}"))),
        }
        if self.incompatible & EXTENDED_L2 != 0 && self.cluster_bits < 14 {
            return bad("Cluster size too small for extended L2 entries; at least 16384 bytes are needed");
        }
        let in_cluster = self.cluster_size() - 1;
        if self.size > i64::MAX as u64 - self.cluster_size() {
            return bad("Image size is too large");
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return bad("Snapshot table too large");
        }
        if self.snapshot_count > 0 && self.snapshots_offset & in_cluster != 0 {
            return bad("Invalid snapshot table offset");
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return bad("Active L1 table too large");
        }
        let needed = self.size.div_ceil(self.l2_coverage());
        if needed * 8 > MAX_L1_BYTES {
            return bad("Image is too big");
        }
        if u64::from(self.l1_size) < needed {
            return bad("L1 table is too small");
        }
        // 2^56 is where an entry's offset field ends.
        if self.l1_size > 0
            && (self.l1_offset & in_cluster != 0 || self.l1_offset >= 1 << 56 || self.l1_offset == 0)
        {
            return bad("Active L1 table offset invalid");
        }
        if self.reftable_clusters == 0 && !for_check {
            return bad("Image does not contain a reference count table");
        }
        if u64::from(self.reftable_clusters) * self.cluster_size()
            > MAX_REFTABLE_BYTES.max(self.cluster_size())
        {
            return bad("Image reference count table too large");
        }
        if self.reftable_clusters > 0
            && (self.reftable_offset & in_cluster != 0
                || self.reftable_offset >= 1 << 56
                || self.reftable_offset == 0)
        {
            return bad("Invalid reference count table offset");
        }
        if self.incompatible & DATA_FILE != 0 && self.snapshot_count > 0 {
            return bad("snapshots are not supported together with an external data file");
        }
        Ok(())
    }

    /// Clears the autoclear bits whose meaning is not known here, as a writer must.
    pub(super) fn forget_unknown_autoclear(&mut self) -> bool {
        let known = self.autoclear & KNOWN_AUTOCLEAR;
        std::mem::replace(&mut self.autoclear, known) != known
    }

    /// The header cluster's bytes (fields, extensions, backing name); refuses what does not fit a cluster.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let out = self.encode_with(true)?;
        // In the smallest clusters the names of features, which only serve error messages, make room for the rest.
        let out = if out.len() as u64 > self.cluster_size() { self.encode_with(false)? } else { out };
        if out.len() as u64 > self.cluster_size() {
            return Err(Error::usage(format!(
                "The header ({} bytes) does not fit a cluster of {} bytes; use larger clusters or a shorter backing file name",
                out.len(),
                self.cluster_size()
            )));
        }
        Ok(out)
    }

    fn encode_with(&self, names: bool) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        out.extend(MAGIC);
        out.extend(self.version.to_be_bytes());
        out.extend([0; 12]); // the backing name's place, filled in below
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.reftable_offset.to_be_bytes());
        out.extend(self.reftable_clusters.to_be_bytes());
        out.extend(self.snapshot_count.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend((112 + self.unknown_fields.len() as u32).to_be_bytes());
            out.push(self.compression);
            out.extend([0; 7]);
            out.extend(&self.unknown_fields);
        }
        let mut extension = |kind: u32, data: &[u8]| {
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.as_ref()) {
            extension(EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extension(EXT_DATA_FILE, name.as_bytes());
        }
        if let Some((offset, len)) = self.crypto {
            extension(EXT_CRYPTO, &[offset.to_be_bytes(), len.to_be_bytes()].concat());
        }
        if self.version >= 3 && names {
            extension(EXT_FEATURE_NAMES, &feature_names());
        }
        if let Some(b) = self.bitmaps {
            let mut data = Vec::with_capacity(24);
            data.extend(b.count.to_be_bytes());
            data.extend([0; 4]);
            data.extend(b.directory_size.to_be_bytes());
            data.extend(b.directory_offset.to_be_bytes());
            extension(EXT_BITMAPS, &data);
        }
        for (kind, data) in &self.unknown_extensions {
            extension(*kind, data);
        }
        extension(EXT_END, &[]);
        if let Some(backing) = &self.backing {
            let (at, name) = (out.len() as u64, backing.name.as_bytes());
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            if name.len() > 1023 {
                return Err(Error::usage("Backing file name too long"));
            }
            out.extend(name);
        }
        Ok(out)
    }

    /// Writes the header cluster.
    pub(super) fn write(&self, storage: &dyn Storage) -> Result<()> {
        let mut bytes = self.encode()?;
        // What a longer header left behind must not be read as part of this one; bytes past the first 4 KiB never were.
        let room = (self.cluster_size() as usize).min(4096);
        if bytes.len() < room {
            bytes.resize(room, 0);
        }
        storage.write_at(&bytes, 0)
    }
}

/// Names of the features known here, for programs that do not know them.
fn feature_names() -> Vec<u8> {
    let table: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::with_capacity(table.len() * 48);
    for (kind, bit, name) in table {
        out.extend([kind, bit]);
        out.extend(name.as_bytes());
        out.resize(out.len().next_multiple_of(48), 0);
    }
    out
}

#[cfg(test)]
pub(super) fn example() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 1 << 30,
        crypt_method: 0,
        l1_size: 2,
        l1_offset: 0x30000,
        reftable_offset: 0x10000,
        reftable_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        compression: 0,
        backing: Some(Backing { name: "base.img".into(), format: Some("raw".into()) }),
        bitmaps: None,
        crypto: None,
        data_file: None,
        unknown_extensions: vec![(0x1234, vec![1, 2, 3])],
        unknown_fields: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use proptest::prelude::*;

    #[test]
    fn header_round_trips() {
        let header = example();
        let s = MemoryStorage::default();
        header.write(&s).unwrap();
        assert_eq!(Header::read(&s, true, false).unwrap(), header);
        let bare = Header { backing: None, ..header };
        bare.write(&s).unwrap();
        assert_eq!(Header::read(&s, true, false).unwrap(), bare);
    }

    #[test]
    fn unknown_incompatible_features_are_named() {
        let mut header = example();
        header.incompatible = 1 << 9;
        let s = MemoryStorage::default();
        header.write(&s).unwrap();
        assert!(Header::read(&s, true, false).unwrap_err().to_string().contains("200"));
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(at in 0usize..400, value in any::<u8>(), at2 in 4usize..112, value2 in any::<u8>()) {
            let mut bytes = example().encode().unwrap();
            bytes.resize(512, 0);
            bytes[at] = value;
            bytes[at2] = value2;
            let _ = Header::read(&MemoryStorage::new(bytes), false, true);
        }
    }
}
