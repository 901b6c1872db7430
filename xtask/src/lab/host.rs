//! The lab host: a stock Debian kernel under QEMU's TCG, which emulates an AMD processor with SVM and nested paging.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::apt::Package;
use crate::cpio::Archive;
use crate::modules::{self, Modules};
use crate::{guest, paths};

use super::scenario::{self, Scenario};
use super::{Material, programs};

/// What `/dev/kvm` takes on the emulated processor, in load order.
const KVM: &[&str] = &["irqbypass", "ccp", "kvm", "kvm_amd"];

/// A lab host ready to start.
pub struct Host {
    initramfs: PathBuf,
    arguments: Vec<String>,
}

impl Host {
    /// Builds the image for one scenario. `shell` leaves the user at a shell instead of running it.
    pub fn build(scenario: &Scenario, material: &Material, icount: bool, shell: bool) -> Result<Host> {
        let lock = paths::lock_cache()?;
        let package = Package::require("linux-image-amd64")?.behind("linux-image-")?.unpacked()?;
        let busybox = guest::busybox_program(&Package::require("busybox-static")?)?;
        drop(lock);
        let image = image(scenario, material, &package, &busybox)?;
        let directory = paths::cache()?.join("lab");
        remove_abandoned(&directory)?;
        // Two tasks may run the same scenario at once.
        let initramfs = directory.join(format!("{}-{}.cpio", scenario.name, std::process::id()));
        std::fs::write(&initramfs, image).with_context(|| initramfs.display().to_string())?;
        let kernel = guest::vmlinuz(&package)?;
        let arguments = arguments(scenario, icount || scenario.icount, shell, &kernel, &initramfs);
        Ok(Host { initramfs, arguments })
    }

    /// The arguments for QEMU.
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// The command that starts it, for a shell.
    fn command_line(&self) -> String {
        let quote = |word: &String| if word.contains(' ') { format!("'{word}'") } else { word.clone() };
        let words: Vec<_> = self.arguments.iter().map(quote).collect();
        format!("{} {}", programs::QEMU, words.join(" "))
    }

    /// Keeps its image, under a name of its own, and returns the command that starts it.
    pub fn keep(mut self, name: &str) -> Result<String> {
        let kept = self.initramfs.with_file_name(format!("{name}.cpio"));
        std::fs::rename(&self.initramfs, &kept).with_context(|| kept.display().to_string())?;
        let (old, new) = (self.initramfs.display().to_string(), kept.display().to_string());
        self.arguments.iter_mut().filter(|word| **word == old).for_each(|word| word.clone_from(&new));
        Ok(self.command_line())
    }

    /// Deletes its image.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.initramfs).with_context(|| self.initramfs.display().to_string())
    }
}

/// Deletes images of tasks that were killed before they could do it.
fn remove_abandoned(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if owner(&name).is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// The process that an image of this name belongs to.
fn owner(name: &str) -> Option<u32> {
    name.strip_suffix(".cpio")?.rsplit_once('-')?.1.parse().ok()
}

fn arguments(scenario: &Scenario, icount: bool, shell: bool, kernel: &Path, initramfs: &Path) -> Vec<String> {
    let run = if shell { "shell" } else { scenario.name.as_str() };
    let append = format!("console=ttyS0 panic=-1 quiet lab.run={run}");
    let cpus = if icount { 1 } else { scenario.cpus };
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    // Instruction counting needs the one-thread TCG; otherwise each processor has a thread.
    add(&["-accel", if icount { "tcg,thread=single" } else { "tcg,thread=multi" }]);
    if icount {
        add(&["-icount", "shift=0,align=off,sleep=off"]);
    }
    add(&[
        "-machine",
        "q35",
        "-cpu",
        "max,+svm,+npt",
        "-smp",
        &cpus.to_string(),
        "-m",
        &scenario.memory.to_string(),
    ]);
    add(&["-display", "none", "-monitor", "none", "-serial", "stdio", "-net", "none", "-no-reboot"]);
    add(&["-kernel", &kernel.display().to_string(), "-initrd", &initramfs.display().to_string()]);
    add(&["-append", &append]);
    arguments.extend(scenario.qemu.iter().cloned());
    arguments
}

fn image(scenario: &Scenario, material: &Material, package: &Path, busybox: &Path) -> Result<Vec<u8>> {
    let lab = scenario::directory();
    let mut archive = Archive::new();
    for directory in ["/dev", "/proc", "/sys", "/tmp", "/root", "/run", "/mnt", "/var/tmp"] {
        archive.directory(directory)?;
    }
    archive.character_device("/dev/console", 5, 1)?;
    archive.copy(&lab.join("host/init"), "/init")?;
    archive.copy(busybox, "/bin/busybox")?;
    archive.copy(&lab.join("lib.sh"), "/lab/lib.sh")?;
    archive.copy(&scenario.path, &format!("/lab/scenarios/{}.sh", scenario.name))?;

    let names: Vec<&str> = KVM.iter().copied().chain(scenario.modules.iter().map(String::as_str)).collect();
    let available = Modules::open(package)?;
    let modules = available.with_dependencies(&names)?;
    modules::install(&mut archive, available.release(), &modules)?;
    archive.file("/lab/modules", 0o644, names.join("\n").as_bytes())?;

    if scenario.needs("guest") {
        archive.copy(&material.guest.bzimage(), "/lab/guest/bzImage")?;
        archive.copy(&material.guest.vmlinux(), "/lab/guest/vmlinux")?;
        archive.copy(&material.guest.initramfs(), "/lab/guest/initramfs.cpio")?;
        archive.copy(&material.guest.diskload(), "/lab/guest/diskload.cpio")?;
    }
    if scenario.needs("tiny") {
        archive.copy(&material.tiny, "/lab/guest/tiny")?;
    }
    if let Some(kvasir) = material.kvasir.as_deref().filter(|_| scenario.needs("kvasir")) {
        programs::add(&mut archive, kvasir, "/usr/bin/kvasir")?;
    }
    if scenario.needs("stopwatch") {
        let own = std::env::current_exe().context("cannot find this program")?;
        programs::add(&mut archive, &own, "/usr/bin/xtask")?;
    }
    if scenario.needs("qemu") {
        programs::add_qemu(&mut archive)?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_name_their_process() {
        assert_eq!(owner("bench-boot-123.cpio"), Some(123));
        assert_eq!(owner("bench-boot.cpio"), None);
        assert_eq!(owner("boot-123.log"), None);
    }

    #[test]
    fn instruction_counting_takes_one_processor() {
        let scenario = Scenario { name: "x".into(), cpus: 4, memory: 512, ..Scenario::default() };
        let line =
            |icount, shell| arguments(&scenario, icount, shell, Path::new("/k"), Path::new("/i")).join(" ");
        assert!(line(false, false).contains("-smp 4 -m 512"));
        assert!(line(false, false).contains("lab.run=x"));
        assert!(
            line(true, false).contains("-icount shift=0,align=off,sleep=off")
                && line(true, false).contains("-smp 1")
        );
        assert!(line(false, true).contains("lab.run=shell"));
    }
}
