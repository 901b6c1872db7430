//! Kernel modules for an initramfs: which files a module needs, and the index `modprobe` reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cpio, elf, kernel};

/// The modules of one kernel.
pub struct Modules {
    release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// One module, loaded into memory.
pub struct Module {
    pub name: String,
    data: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// The kernel's name for a module: file names have `-` where the kernel says `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The module name in a path such as `kernel/drivers/block/virtio_blk.ko.xz`.
fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|suffix| file.strip_suffix(suffix))?;
    Some(canonical(stem))
}

impl Modules {
    /// Opens the modules in an unpacked kernel package.
    pub fn open(package: &Path) -> Result<Modules> {
        let root = package.join("lib/modules");
        let root = if root.is_dir() { root } else { package.join("usr/lib/modules") };
        let mut releases = std::fs::read_dir(&root).with_context(|| root.display().to_string())?;
        let directory = releases.next().with_context(|| format!("{}: empty", root.display()))??.path();
        let release = directory.file_name().context("no name")?.to_string_lossy().into_owned();
        let mut files = BTreeMap::new();
        let mut pending = vec![directory.join("kernel")];
        while let Some(next) = pending.pop() {
            for entry in std::fs::read_dir(&next).with_context(|| next.display().to_string())? {
                let path = entry?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = name_of(&path.to_string_lossy()) {
                    files.insert(name, path);
                }
            }
        }
        let builtin = directory.join("modules.builtin");
        let builtin = std::fs::read_to_string(&builtin).with_context(|| builtin.display().to_string())?;
        Ok(Modules { release, files, builtin: builtin.lines().filter_map(name_of).collect() })
    }

    /// The kernel release, the name of the directory below `/lib/modules`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The named modules and all they depend on, dependencies first. What is built into the kernel is left out.
    pub fn with_dependencies(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.visit(&canonical(name), &mut seen, &mut found)?;
        }
        Ok(found)
    }

    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, found: &mut Vec<Module>) -> Result<()> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            bail!("kernel {}: no module named {name}", self.release);
        };
        let module = Module::read(name, path)?;
        for dependency in &module.depends {
            self.visit(dependency, seen, found)?;
        }
        found.push(module);
        Ok(())
    }
}

impl Module {
    fn read(name: &str, path: &Path) -> Result<Module> {
        let raw = std::fs::read(path).with_context(|| path.display().to_string())?;
        let data = match path.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => kernel::filter("xz", &raw)?,
            Some("zst") => kernel::filter("zstd", &raw)?,
            Some("gz") => kernel::filter("gzip", &raw)?,
            _ => raw,
        };
        let info = elf::section(&data, ".modinfo").with_context(|| path.display().to_string())?;
        let (depends, aliases) = parse_modinfo(info.unwrap_or_default());
        Ok(Module { name: name.to_owned(), data, depends, aliases })
    }
}

/// Reads the dependencies and aliases out of a `.modinfo` section: `key=value` strings ending in NUL.
fn parse_modinfo(section: &[u8]) -> (Vec<String>, Vec<String>) {
    let (mut depends, mut aliases) = (Vec::new(), Vec::new());
    for entry in section.split(|byte| *byte == 0) {
        let entry = String::from_utf8_lossy(entry);
        if let Some(list) = entry.strip_prefix("depends=") {
            depends.extend(list.split(',').filter(|name| !name.is_empty()).map(canonical));
        } else if let Some(alias) = entry.strip_prefix("alias=") {
            aliases.push(alias.to_owned());
        }
    }
    (depends, aliases)
}

/// Puts modules into an initramfs, with the `modules.dep` and `modules.alias` that `modprobe` needs.
pub fn install(archive: &mut cpio::Archive, release: &str, modules: &[Module]) -> Result<()> {
    let directory = format!("/lib/modules/{release}");
    let (mut dep, mut alias) = (String::new(), String::new());
    let by_name: BTreeMap<&str, &Module> =
        modules.iter().map(|module| (module.name.as_str(), module)).collect();
    for module in modules {
        archive.file(&format!("{directory}/{}.ko", module.name), 0o644, &module.data)?;
        dep.push_str(&format!("{}.ko:", module.name));
        for needed in all_dependencies(module, &by_name) {
            dep.push_str(&format!(" {needed}.ko"));
        }
        dep.push('\n');
        for pattern in &module.aliases {
            alias.push_str(&format!("alias {pattern} {}\n", module.name));
        }
    }
    archive.file(&format!("{directory}/modules.dep"), 0o644, dep.as_bytes())?;
    archive.file(&format!("{directory}/modules.alias"), 0o644, alias.as_bytes())
}

/// Everything a module depends on, nearest first, as `modules.dep` lists it.
fn all_dependencies<'a>(module: &'a Module, by_name: &BTreeMap<&'a str, &'a Module>) -> Vec<&'a str> {
    let mut all: Vec<&str> = Vec::new();
    let mut pending = vec![module];
    while let Some(next) = pending.pop() {
        for name in &next.depends {
            let Some(dependency) = by_name.get(name.as_str()) else { continue };
            // A module needed twice must come after both of those that need it.
            all.retain(|other| other != name);
            all.push(name);
            pending.push(dependency);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str]) -> Module {
        let depends = depends.iter().map(|name| (*name).to_owned()).collect();
        Module { name: name.to_owned(), data: Vec::new(), depends, aliases: vec![format!("virtio:{name}*")] }
    }

    #[test]
    fn modinfo_strings() {
        let section =
            b"license=GPL\0depends=virtio_ring,virtio-pci-modern-dev\0alias=pci:v00001AF4d*\0alias=x\0\0";
        let (depends, aliases) = parse_modinfo(section);
        assert_eq!(depends, ["virtio_ring", "virtio_pci_modern_dev"]);
        assert_eq!(aliases, ["pci:v00001AF4d*", "x"]);
        assert_eq!(parse_modinfo(b"depends=\0"), (vec![], vec![]));
    }

    #[test]
    fn names_of_files() {
        assert_eq!(name_of("kernel/fs/fuse/virtio-fs.ko.xz").as_deref(), Some("virtio_fs"));
        assert_eq!(name_of("kvm-amd.ko").as_deref(), Some("kvm_amd"));
        assert_eq!(name_of("modules.order"), None);
    }

    #[test]
    fn a_shared_dependency_comes_last() {
        let modules =
            [module("virtio", &[]), module("ring", &["virtio"]), module("pci", &["virtio", "ring"])];
        let by_name = modules.iter().map(|module| (module.name.as_str(), module)).collect();
        assert_eq!(all_dependencies(&modules[2], &by_name), ["ring", "virtio"]);
        let mut archive = cpio::Archive::new();
        install(&mut archive, "6.1", &modules).expect("installs");
        let bytes = archive.finish().expect("archive");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("pci.ko: ring.ko virtio.ko\n"));
        assert!(text.contains("alias virtio:ring* ring\n"));
    }
}
