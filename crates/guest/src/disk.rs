//! A bootable disk: GUID partition table, GRUB for BIOS and for UEFI, and a root file system.
//!
//! | partition | size | holds |
//! | --- | --- | --- |
//! | 1 | 1 MiB | GRUB's core image (BIOS boot partition) |
//! | 2 | 32 MiB | EFI system partition: `EFI/BOOT/BOOTX64.EFI` |
//! | 3 | the rest | the root file system; last, so that it can grow with the disk |

use crate::{Error, Progress, Result, View};
use block::Image;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
const BIOS_BOOT: (u64, u64) = (MIB, MIB);
const ESP: (u64, u64) = (2 * MIB, 32 * MIB);
const ROOT_START: u64 = 34 * MIB;
/// The backup of the partition table, rounded up to keep the disk a whole number of MiB.
const TAIL: u64 = MIB;
/// Partition number of the root file system, as GRUB and Linux count.
pub const ROOT_PARTITION: u32 = 3;

/// What goes on the disk.
#[derive(Debug)]
pub struct Parts {
    /// The root file system, an image whose size is a multiple of 1 MiB.
    pub root: PathBuf,
    /// GRUB's `boot.img` for `i386-pc`.
    pub boot_image: Vec<u8>,
    /// GRUB's core image for `i386-pc`, as `grub-mkimage` makes it.
    pub core_image: Vec<u8>,
    /// GRUB as an EFI application.
    pub efi_image: Vec<u8>,
}

/// Size in bytes of the disk that a root file system of `root` bytes needs.
pub fn disk_size(root: u64) -> u64 {
    ROOT_START + root.next_multiple_of(MIB) + TAIL
}

/// Writes everything to `image`, which is empty and [`disk_size`] long.
///
/// # Errors
/// A part that does not fit its place, or a failing host.
pub fn assemble(image: &Image, path: &Path, parts: &Parts, progress: &mut dyn Progress) -> Result<()> {
    let root = File::open(&parts.root).map_err(Error::io(&parts.root))?;
    let root_len = root.metadata().map_err(Error::io(&parts.root))?.len();
    partition(image, root_len).map_err(Error::io(path))?;
    embed_grub(image, path, parts)?;
    system_partition(image, &parts.efi_image).map_err(Error::io(path))?;
    copy(&root, root_len, image, progress).map_err(Error::io(path))?;
    image.flush().map_err(Error::image(path))
}

fn partition(image: &Image, root_len: u64) -> io::Result<()> {
    let mut disk = View::new(image, 0, image.size())?;
    let sectors = u32::try_from(image.size() / SECTOR - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut disk).map_err(io::Error::other)?;
    let config = gpt::GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(disk, None).map_err(io::Error::other)?;
    let wanted = [
        ("bios", BIOS_BOOT.0, BIOS_BOOT.1, partition_types::BIOS),
        ("efi", ESP.0, ESP.1, partition_types::EFI),
        ("root", ROOT_START, root_len, partition_types::LINUX_FS),
    ];
    for (number, (name, start, len, kind)) in (1..).zip(wanted) {
        table
            .add_partition_at(name, number, start / SECTOR, len / SECTOR, kind, 0)
            .map_err(io::Error::other)?;
    }
    table.write().map_err(io::Error::other)?;
    Ok(())
}

/// Puts GRUB where a BIOS starts it: `boot.img` into the first sector, which loads the first sector of the core image,
/// whose last bytes say where the rest is. Offsets: GRUB, `include/grub/i386/pc/boot.h`.
fn embed_grub(image: &Image, path: &Path, parts: &Parts) -> Result<()> {
    const BOOT_CODE: usize = 440;
    const KERNEL_SECTOR: usize = 0x5c;
    const DRIVE_CHECK: usize = 0x66;
    const BLOCK_LIST: usize = 0x1f4;
    const LOAD_SEGMENT: u16 = 0x820;

    let lba = BIOS_BOOT.0 / SECTOR;
    if parts.boot_image.len() < 512 || parts.core_image.len() < 1024 {
        return Err(Error::Usage("GRUB's boot or core image is too short to be one".into()));
    }
    let mut boot = parts.boot_image[..BOOT_CODE].to_vec();
    boot[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&lba.to_le_bytes());
    // The check is for floppies, and distrusts what firmware says of the drive.
    boot[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&[0x90, 0x90]);
    image.write_at(&boot, 0).map_err(Error::image(path))?;

    let mut core = parts.core_image.clone();
    core.resize(core.len().next_multiple_of(SECTOR as usize), 0);
    if core.len() as u64 > BIOS_BOOT.1 {
        return Err(Error::Usage(format!("GRUB's core image of {} bytes does not fit 1 MiB", core.len())));
    }
    let rest = (core.len() as u64 / SECTOR - 1) as u16; // at most 2047, by the check above
    core[BLOCK_LIST..BLOCK_LIST + 8].copy_from_slice(&(lba + 1).to_le_bytes());
    core[BLOCK_LIST + 8..BLOCK_LIST + 10].copy_from_slice(&rest.to_le_bytes());
    core[BLOCK_LIST + 10..BLOCK_LIST + 12].copy_from_slice(&LOAD_SEGMENT.to_le_bytes());
    image.write_at(&core, BIOS_BOOT.0).map_err(Error::image(path))
}

fn system_partition(image: &Image, efi: &[u8]) -> io::Result<()> {
    let options = fatfs::FormatVolumeOptions::new().volume_label(*b"EFI        ");
    fatfs::format_volume(&mut View::new(image, ESP.0, ESP.1)?, options)?;
    let fs = fatfs::FileSystem::new(View::new(image, ESP.0, ESP.1)?, fatfs::FsOptions::new())?;
    {
        let boot = fs.root_dir().create_dir("EFI")?.create_dir("BOOT")?;
        boot.create_file("BOOTX64.EFI")?.write_all(efi)?;
    }
    fs.unmount()
}

/// Copies the root file system, without its zeroes.
fn copy(root: &File, len: u64, image: &Image, progress: &mut dyn Progress) -> io::Result<()> {
    let mut buffer = vec![0; MIB as usize];
    let mut at = 0;
    while at < len {
        let n = (len - at).min(MIB) as usize;
        let piece = &mut buffer[..n];
        root.read_exact_at(piece, at)?;
        // Runs of blocks that hold data, at the granularity of the file system.
        let mut from = 0;
        while from < n {
            let block = |i: usize| &piece[i..(i + 4096).min(n)];
            let zero = |i: usize| block(i).iter().all(|b| *b == 0);
            let mut to = from;
            while to < n && !zero(to) {
                to += 4096;
            }
            let to = to.min(n);
            if to > from {
                image.write_at(&piece[from..to], ROOT_START + at + from as u64).map_err(io::Error::other)?;
            }
            from = to + 4096;
        }
        at += n as u64;
        progress.bytes(at, Some(len));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::{Create, OpenOptions, create_image};

    #[test]
    fn the_disk_has_everything_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let mut data = vec![0u8; 3 << 20];
        data[0] = 1;
        data[(2 << 20) + 5000] = 7;
        std::fs::write(&root, &data).unwrap();
        let path = dir.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        create_image(&Create {
            size: Some(disk_size(3 << 20)),
            name: name.into(),
            format: "qcow2".into(),
            ..Create::default()
        })
        .unwrap();
        let image = Image::open(name, &OpenOptions::writer(Some("qcow2"))).unwrap();
        let parts = Parts {
            root,
            boot_image: (0..512u32).map(|i| i as u8).collect(),
            core_image: vec![3; 20_000],
            efi_image: b"MZ efi".to_vec(),
        };
        assemble(&image, &path, &parts, &mut crate::Quiet).unwrap();

        let table = gpt::GptConfig::new()
            .logical_block_size(LogicalBlockSize::Lb512)
            .open_from_device(View::new(&image, 0, image.size()).unwrap())
            .unwrap();
        let places: Vec<_> =
            table.partitions().values().map(|p| (p.name.clone(), p.first_lba, p.last_lba)).collect();
        assert_eq!(
            places,
            [
                ("bios".into(), 2048, 4095),
                ("efi".into(), 4096, 69631),
                ("root".into(), 69632, 69632 + (3 << 11) - 1)
            ]
        );
        let mut sector = [0; 512];
        image.read_at(&mut sector, 0).unwrap();
        assert_eq!(sector[510..], [0x55, 0xaa]);
        assert_eq!(sector[0x5c..0x64], 2048u64.to_le_bytes());
        assert_eq!(sector[0x50], 0x50, "the rest of the boot code");
        image.read_at(&mut sector, MIB).unwrap();
        assert_eq!(sector[0x1f4..0x1fc], 2049u64.to_le_bytes());
        assert_eq!(sector[0x1fc..0x200], [39, 0, 0x20, 0x08]);
        let mut back = vec![0; 3 << 20];
        image.read_at(&mut back, ROOT_START).unwrap();
        assert!(back == data, "the root file system differs");
        let esp = View::new(&image, ESP.0, ESP.1).unwrap();
        let fs = fatfs::FileSystem::new(esp, fatfs::FsOptions::new()).unwrap();
        let mut efi = Vec::new();
        io::Read::read_to_end(&mut fs.root_dir().open_file("EFI/BOOT/BOOTX64.EFI").unwrap(), &mut efi)
            .unwrap();
        assert_eq!(efi, b"MZ efi");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let name = path.to_str().unwrap();
        create_image(&Create {
            size: Some(disk_size(0)),
            name: name.into(),
            format: "raw".into(),
            ..Create::default()
        })
        .unwrap();
        let image = Image::open(name, &OpenOptions::writer(Some("raw"))).unwrap();
        let parts = |boot: usize, core: usize| Parts {
            root: "/dev/null".into(),
            boot_image: vec![0; boot],
            core_image: vec![0; core],
            efi_image: Vec::new(),
        };
        for bad in [parts(100, 2000), parts(512, 100), parts(512, (1 << 20) + 1)] {
            assert!(embed_grub(&image, &path, &bad).is_err());
        }
        assert!(View::new(&image, 1, image.size()).is_err());
    }
}
