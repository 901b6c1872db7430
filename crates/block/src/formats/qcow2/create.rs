//! Making new images, and saying how large they would get.

use super::{
    crypto,
    header::{self, Header},
};
use crate::{
    Context, Error, Options, Result,
    formats::{Creation, Measured, Measurement, Preallocation, qcow2::DRIVER},
    options::{OptionKind, OptionSpec},
};

const fn option(
    name: &'static str,
    kind: OptionKind,
    help: &'static str,
    default: Option<&'static str>,
) -> OptionSpec {
    OptionSpec { name, kind, help, default }
}

/// Creation options.
pub(super) const OPTIONS: &[OptionSpec] = &[
    option("cluster_size", OptionKind::Size, "qcow2 cluster size", Some("65536")),
    option("compat", OptionKind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])", None),
    option(
        "compression_type",
        OptionKind::Text,
        "Compression method used for image cluster compression",
        Some("zlib"),
    ),
    option("data_file", OptionKind::Text, "File name of an external data file", None),
    option("data_file_raw", OptionKind::Bool, "The external data file must stay valid as a raw image", None),
    option("encrypt.cipher-alg", OptionKind::Text, "Name of encryption cipher algorithm", None),
    option("encrypt.cipher-mode", OptionKind::Text, "Name of encryption cipher mode", None),
    option("encrypt.format", OptionKind::Text, "Encrypt the image, format choices: 'aes', 'luks'", None),
    option("encrypt.hash-alg", OptionKind::Text, "Name of encryption hash algorithm", None),
    option("encrypt.iter-time", OptionKind::Number, "Time to spend in PBKDF in milliseconds", None),
    option("encrypt.ivgen-alg", OptionKind::Text, "Name of IV generator algorithm", None),
    option("encrypt.ivgen-hash-alg", OptionKind::Text, "Name of IV generator hash algorithm", None),
    option(
        "encrypt.key-secret",
        OptionKind::Text,
        "ID of secret providing qcow AES key or LUKS passphrase",
        None,
    ),
    option(
        "encryption",
        OptionKind::Bool,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        None,
    ),
    option("extended_l2", OptionKind::Bool, "Extended L2 tables", Some("off")),
    option("lazy_refcounts", OptionKind::Bool, "Postpone refcount updates", Some("off")),
    option(
        "preallocation",
        OptionKind::Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
        None,
    ),
    option("refcount_bits", OptionKind::Number, "Width of a reference count entry in bits", Some("16")),
];

/// Options taken apart and checked.
struct Choice {
    header: Header,
    preallocation: Preallocation,
    encryption: crypto::Choice,
}

fn choose(size: u64, options: &mut Options, has_backing: bool) -> Result<Choice> {
    let cluster_size = options.take_size("cluster_size")?.unwrap_or(65536);
    if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
        return Err(Error::usage("Cluster size must be a power of two between 512 and 2048k"));
    }
    let version = match options.take("compat").as_deref() {
        None | Some("1.1" | "v3") => 3,
        Some("0.10" | "v2") => 2,
        Some(other) => {
            return Err(Error::usage(format!("Invalid compatibility level: '{other}'")));
        }
    };
    let (mut incompatible, mut compatible, mut autoclear) = (0, 0, 0);
    let extended = options.take_bool("extended_l2")?.unwrap_or(false);
    if extended {
        if version < 3 {
            return Err(Error::usage(
                "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        if cluster_size < 16384 {
            return Err(Error::usage(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        incompatible |= header::EXTENDED_L2;
    }
    if options.take_bool("lazy_refcounts")?.unwrap_or(false) {
        if version < 3 {
            return Err(Error::usage(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        compatible |= header::LAZY_REFCOUNTS;
    }
    let refcount_bits = options.take_number("refcount_bits")?.unwrap_or(16);
    if refcount_bits > 64 || !refcount_bits.is_power_of_two() {
        return Err(Error::usage("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if version < 3 && refcount_bits != 16 {
        return Err(Error::usage(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ));
    }
    let compression = match options.take("compression_type").as_deref() {
        None | Some("zlib") => 0,
        Some("zstd") => 1,
        Some(other) => {
            return Err(Error::usage(format!("Parameter 'compression_type' does not accept value '{other}'")));
        }
    };
    if compression != 0 {
        if version < 3 {
            return Err(Error::usage(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        incompatible |= header::COMPRESSION;
    }
    let data_file = options.take("data_file");
    let raw = options.take_bool("data_file_raw")?.unwrap_or(false);
    if data_file.is_some() {
        if version < 3 {
            return Err(Error::usage(
                "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        incompatible |= header::DATA_FILE;
    }
    if raw {
        if data_file.is_none() {
            return Err(Error::usage("data-file-raw requires data-file"));
        }
        if has_backing {
            return Err(Error::usage("Backing file and data-file-raw cannot be used at the same time"));
        }
        autoclear |= header::RAW_DATA_FILE;
    }
    let encryption = crypto::Choice::take(options)?;
    let mut preallocation = match options.take("preallocation") {
        Some(mode) => Preallocation::parse(&mode)?,
        None => Preallocation::Off,
    };
    if raw && preallocation == Preallocation::Off {
        // Every cluster has its place in the data file from the start, so that the file alone is always right.
        preallocation = Preallocation::Metadata;
    }
    if has_backing && preallocation != Preallocation::Off && !extended {
        return Err(Error::usage(
            "Backing file and preallocation can only be used at the same time if extended_l2 is enabled",
        ));
    }
    let header = Header {
        version,
        cluster_bits: cluster_size.trailing_zeros(),
        size,
        crypt_method: encryption.method(),
        l1_size: 0,
        l1_offset: 0,
        reftable_offset: 0,
        reftable_clusters: 0,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible,
        compatible,
        autoclear,
        refcount_order: refcount_bits.trailing_zeros(),
        compression,
        backing: None,
        bitmaps: None,
        crypto: None,
        data_file,
        unknown_extensions: Vec::new(),
        unknown_fields: Vec::new(),
    };
    Ok(Choice { header, preallocation, encryption })
}

pub(super) fn create(creation: Creation<'_>) -> Result<()> {
    let size =
        creation.size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
    let secret_id = creation.options.get("encrypt.key-secret").map(str::to_owned);
    let Choice { mut header, preallocation, encryption } = choose(size, creation.options, creation.backing.is_some())?;
    header.backing = creation.backing;
    let (cluster, bits) = (header.cluster_size(), header.cluster_bits);
    let l1_size = size.div_ceil(header.l2_coverage());
    if l1_size * 8 > header::MAX_L1_BYTES {
        return Err(Error::usage(format!("Image size too large for clusters of {cluster} bytes")));
    }
    let luks = encryption.header(creation.secrets)?;
    let luks_clusters = (luks.len() as u64).div_ceil(cluster);
    // Header, refcount table, refcount blocks, L1 table, encryption header: one after the other.
    let l1_clusters = (l1_size * 8).div_ceil(cluster);
    let per_block = 1u64 << (bits + 3 - header.refcount_order);
    let (mut table_clusters, mut blocks) = (1, 1);
    loop {
        let total = 1 + table_clusters + blocks + l1_clusters + luks_clusters;
        let need_blocks = total.div_ceil(per_block);
        let need_table = (need_blocks * 8).div_ceil(cluster);
        if need_blocks <= blocks && need_table <= table_clusters {
            break;
        }
        (blocks, table_clusters) = (blocks.max(need_blocks), table_clusters.max(need_table));
    }
    header.reftable_offset = cluster;
    header.reftable_clusters = table_clusters as u32;
    let blocks_at = 1 + table_clusters;
    let l1_at = blocks_at + blocks;
    header.l1_size = l1_size as u32;
    // QEMU wants a valid offset even for a disk without a table.
    header.l1_offset = l1_at << bits;
    let luks_at = l1_at + l1_clusters;
    if !luks.is_empty() {
        header.crypto = Some((luks_at << bits, luks.len() as u64));
    }
    header.encode()?;
    let storage = creation.storage;
    if let Some(name) = &header.data_file {
        let data =
            creation.siblings.create(name, size).context(|| "Could not create the external data file")?;
        data.set_size(size)?;
        if matches!(preallocation, Preallocation::Falloc | Preallocation::Full) {
            crate::formats::raw::allocate(&*data, 0, size, preallocation)?;
        }
    }
    let total = luks_at + luks_clusters;
    // The L1 table need not fill its last cluster, if it is the last.
    storage.set_size(match luks_clusters {
        0 => (l1_at << bits) + (l1_size * 8).next_multiple_of(512),
        _ => total << bits,
    })?;
    storage.write_at(&luks, luks_at << bits)?;
    let mut table = vec![0u8; (table_clusters << bits) as usize];
    for (i, slot) in table.chunks_exact_mut(8).take(blocks as usize).enumerate() {
        slot.copy_from_slice(&((blocks_at + i as u64) << bits).to_be_bytes());
    }
    storage.write_at(&table, cluster)?;
    let mut block = vec![0u8; cluster as usize];
    for i in 0..blocks {
        block.fill(0);
        for c in i * per_block..((i + 1) * per_block).min(total) {
            super::refcount::set_count(&mut block, header.refcount_order, c - i * per_block, 1);
        }
        storage.write_at(&block, (blocks_at + i) << bits)?;
    }
    if !storage.grows_with_zeros() {
        crate::storage::StorageExt::fill_zeroes(
            &*storage,
            l1_at << bits,
            (l1_size * 8).next_multiple_of(512),
        )?;
    }
    header.write(&*storage)?;
    if preallocation != Preallocation::Off {
        let mut opening = Options::new();
        if let Some(id) = secret_id {
            opening.set("encrypt.key-secret", id);
        }
        let image = (DRIVER.open)(crate::formats::Opening {
            storage,
            read_only: false,
            options: &mut opening,
            siblings: creation.siblings,
            secrets: creation.secrets,
            for_check: false,
            no_io: false,
        })?;
        image.preallocate(preallocation)?;
        image.close()?;
    }
    Ok(())
}

/// Clusters that refcounts for `clusters` others take, their own included.
fn refcount_clusters(clusters: u64, header: &Header) -> u64 {
    let per_block = 1u64 << (header.cluster_bits + 3 - header.refcount_order);
    let per_table = header.cluster_size() / 8;
    let (mut table, mut blocks, mut last) = (0, 0, u64::MAX);
    while last != table + blocks {
        last = table + blocks;
        blocks = (clusters + table + blocks).div_ceil(per_block);
        table = blocks.div_ceil(per_table);
    }
    table + blocks
}

pub(super) fn measure(m: Measurement<'_>) -> Result<Measured> {
    let size = m.size.checked_next_multiple_of(512).ok_or_else(|| Error::usage("Image size too large"))?;
    let Choice { header, preallocation, mut encryption } = choose(size, m.options, m.backing)?;
    let cluster = header.cluster_size();
    let l2 = size.div_ceil(header.l2_coverage());
    let l1 = (l2 * 8).div_ceil(cluster);
    if l2 * 8 > header::MAX_L1_BYTES {
        return Err(Error::usage("The image size is too large (try using a larger cluster size)"));
    }
    // Header cluster, L1 and L2 tables for the whole disk, as the size is to be enough for any layout.
    let meta = 1 + l1 + l2;
    let data_clusters = size.div_ceil(cluster);
    let all = meta + data_clusters;
    let luks = encryption.header_size()?.next_multiple_of(cluster);
    let fully_allocated = (all + refcount_clusters(all, &header)) * cluster + luks;
    let mut used = 0;
    let mut covered = 0;
    for &(offset, len) in m.data {
        let (first, end) = ((offset / cluster).max(covered), (offset + len).div_ceil(cluster));
        used += end.saturating_sub(first);
        covered = covered.max(end);
    }
    if preallocation != Preallocation::Off {
        used = data_clusters;
    }
    let required = fully_allocated - (data_clusters - used.min(data_clusters)) * cluster;
    let bitmaps = m.bitmaps.map(|list| {
        let mut clusters = 0;
        let mut directory = 0u64;
        for &(granularity, name) in list {
            let bytes = size.div_ceil(granularity.max(512)).div_ceil(8);
            let data = bytes.div_ceil(cluster);
            clusters += data + (data * 8).div_ceil(cluster);
            directory += (24 + name as u64).next_multiple_of(8);
        }
        (clusters + directory.div_ceil(cluster)) * cluster
    });
    Ok(Measured { required, fully_allocated, bitmaps })
}
