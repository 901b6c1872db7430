//! The machine under examination: files below a root directory.

use std::io;
use std::path::{Path, PathBuf};

/// A machine, as its `/proc`, `/sys`, `/dev` and `/usr` show it.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

/// How a kernel module stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Module {
    /// Loaded, or part of the kernel.
    Present,
    /// Installed and not loaded.
    Loadable,
    /// Unknown to this kernel.
    Absent,
}

impl Host {
    /// This machine.
    #[must_use]
    pub fn here() -> Host {
        Host::below("/")
    }

    /// A machine whose root directory is elsewhere.
    #[must_use]
    pub fn below(root: impl Into<PathBuf>) -> Host {
        Host { root: root.into() }
    }

    /// Where an absolute path of the machine is to be found.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(crate) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A file's text without white space around it; `None` if it cannot be read.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let bytes = std::fs::read(self.path(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// A file that holds one number.
    pub(crate) fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The chosen word of a file such as `always [madvise] never`.
    pub(crate) fn choice(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        Some(chosen.unwrap_or(&text).to_owned())
    }

    /// The names in a directory, sorted; empty if there is none.
    pub(crate) fn names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(path)) else { return Vec::new() };
        let name = |entry: io::Result<std::fs::DirEntry>| {
            Some(entry.ok()?.file_name().to_string_lossy().into_owned())
        };
        let mut names: Vec<String> = entries.filter_map(name).collect();
        names.sort();
        names
    }

    /// A value in KiB of `/proc/meminfo`; a bare count for the lines that are one.
    pub(crate) fn meminfo(&self, key: &str) -> Option<u64> {
        let text = self.text("/proc/meminfo")?;
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        value.split_whitespace().next()?.parse().ok()
    }

    /// The first processor's `flags`.
    pub(crate) fn cpu_flags(&self) -> Vec<String> {
        let text = self.text("/proc/cpuinfo").unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let flags = line.split_once(':').map_or("", |(_, flags)| flags);
        flags.split_whitespace().map(str::to_owned).collect()
    }

    /// Opens a device for reading and writing, and closes it again.
    pub(crate) fn open_device(&self, path: &str) -> io::Result<()> {
        std::fs::File::options().read(true).write(true).open(self.path(path)).map(drop)
    }

    /// Whether a kernel module is loaded, can be, or is not there.
    pub(crate) fn module(&self, name: &str) -> Module {
        if self.exists(&format!("/sys/module/{name}")) {
            return Module::Present;
        }
        let Some(release) = self.text("/proc/sys/kernel/osrelease") else { return Module::Absent };
        let listed = |file: &str| {
            let list = self.text(&format!("/lib/modules/{release}/{file}")).unwrap_or_default();
            list.lines().any(|line| module_name(line) == name)
        };
        if listed("modules.builtin") {
            Module::Present
        } else if listed("modules.dep") {
            Module::Loadable
        } else {
            Module::Absent
        }
    }
}

/// The kernel's name for the module on a line such as `kernel/drivers/net/vhost-net.ko.xz: ...`.
fn module_name(line: &str) -> String {
    let path = Path::new(line.split(':').next().unwrap_or_default());
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// A made-up machine for tests.
#[cfg(test)]
pub(crate) mod fake {
    use super::Host;
    use std::path::Path;

    /// A root directory, deleted with the value.
    pub(crate) struct Fake {
        directory: tempfile::TempDir,
        pub(crate) host: Host,
    }

    impl Fake {
        pub(crate) fn new() -> Fake {
            let directory = tempfile::tempdir().expect("temporary directory");
            let host = Host::below(directory.path());
            Fake { directory, host }
        }

        /// Adds a file with this text.
        pub(crate) fn with(self, path: &str, text: &str) -> Fake {
            let full = self.directory.path().join(path.trim_start_matches('/'));
            std::fs::create_dir_all(full.parent().unwrap_or(Path::new("/"))).expect("directory");
            std::fs::write(full, text).expect("file");
            self
        }

        /// Adds an empty directory.
        pub(crate) fn with_directory(self, path: &str) -> Fake {
            let full = self.directory.path().join(path.trim_start_matches('/'));
            std::fs::create_dir_all(full).expect("directory");
            self
        }

        /// Adds a processor with these flags.
        pub(crate) fn with_cpu(self, flags: &str) -> Fake {
            self.with("/proc/cpuinfo", &format!("processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Fake;
    use super::*;

    #[test]
    fn reads_what_files_say() {
        let fake = Fake::new()
            .with("/sys/x", "always [madvise] never\n")
            .with("/sys/n", "12\n")
            .with("/proc/meminfo", "MemTotal:  100 kB\nHugePages_Total:      3\n")
            .with_cpu("svm npt");
        assert_eq!(fake.host.choice("/sys/x").as_deref(), Some("madvise"));
        assert_eq!(fake.host.choice("/sys/n").as_deref(), Some("12"));
        assert_eq!(fake.host.number("/sys/n"), Some(12));
        assert_eq!(fake.host.number("/sys/none"), None);
        assert_eq!(fake.host.meminfo("HugePages_Total"), Some(3));
        assert_eq!(fake.host.meminfo("Mem"), None);
        assert_eq!(fake.host.cpu_flags(), ["fpu", "svm", "npt"]);
        assert_eq!(fake.host.names("/sys"), ["n", "x"]);
    }

    #[test]
    fn modules_loaded_built_in_loadable_and_absent() {
        let fake = Fake::new()
            .with("/proc/sys/kernel/osrelease", "6.1\n")
            .with("/lib/modules/6.1/modules.dep", "kernel/drivers/vhost/vhost-net.ko.xz: kernel/net/tun.ko\n")
            .with("/lib/modules/6.1/modules.builtin", "kernel/drivers/vfio/vfio.ko\n")
            .with_directory("/sys/module/kvm");
        assert_eq!(fake.host.module("kvm"), Module::Present);
        assert_eq!(fake.host.module("vfio"), Module::Present);
        assert_eq!(fake.host.module("vhost_net"), Module::Loadable);
        assert_eq!(fake.host.module("tun"), Module::Absent, "only named as a dependency");
    }
}
