//! The directory of virtual machines, and the description of each.

use crate::Failure;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Name of the description inside a VM's directory.
const DESCRIPTION: &str = "vm.json";
/// Held locked while the VM runs.
const LOCK: &str = "lock";

/// How to log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ssh {
    /// Port on the host's loopback that leads to the guest's port 22.
    pub(super) port: u16,
    /// User in the guest.
    pub(super) user: String,
    /// Private key, if we made one; a path in the VM's directory.
    pub(super) key: Option<PathBuf>,
    /// Password for the console, if we made one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) password: Option<String>,
}

/// What a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    /// What its disk was made from.
    pub(super) from: String,
    /// As `--memory`.
    pub(super) memory: String,
    /// As `--cpus`.
    pub(super) cpus: String,
    /// As `--firmware`, without the store of variables.
    pub(super) firmware: String,
    /// Disk image in the VM's directory.
    pub(super) disk: Option<PathBuf>,
    /// Seed in the VM's directory.
    pub(super) seed: Option<PathBuf>,
    /// ISO image in the CD-ROM drive.
    pub(super) cdrom: Option<PathBuf>,
    /// How to log in.
    pub(super) ssh: Option<Ssh>,
    /// More arguments of `kvasir run`.
    #[serde(default)]
    pub(super) arguments: Vec<String>,
}

/// A kept VM.
#[derive(Clone, Debug)]
pub(super) struct Vm {
    pub(super) name: String,
    pub(super) dir: PathBuf,
    pub(super) description: Description,
}

/// All kept VMs of this user.
pub(super) struct Store(PathBuf);

fn host(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Failure {
    move |e| Failure { status: crate::status::HOST, message: format!("{what}: {e}") }
}

/// A directory of this user's: `$KVASIR_HOME`/`$KVASIR_CACHE` if set, else below the directory that the XDG base
/// directory specification names.
fn user_dir(own: &str, xdg: &str, fallback: &str) -> Result<PathBuf, Failure> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = set(own) {
        return Ok(dir);
    }
    let base = set(xdg).filter(|d| d.is_absolute()).or_else(|| set("HOME").map(|h| h.join(fallback)));
    let base =
        base.ok_or_else(|| Failure::usage(format!("HOME is not set: say where to keep things in {own}")))?;
    Ok(base.join("kvasir"))
}

/// Where disks that VMs are made from are kept.
pub(super) fn cache() -> Result<PathBuf, Failure> {
    Ok(user_dir("KVASIR_CACHE", "XDG_CACHE_HOME", ".cache")?.join("images"))
}

/// Names of VMs: what a file name and a host name can both be.
pub(super) fn check_name(name: &str) -> Result<(), Failure> {
    let good = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= 63
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if good {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "'{name}' cannot be a VM's name: use up to 63 letters, digits, '-', '.' and '_', a letter or digit first"
    )))
}

impl Store {
    pub(super) fn open() -> Result<Self, Failure> {
        Ok(Self(user_dir("KVASIR_HOME", "XDG_DATA_HOME", ".local/share")?.join("vms")))
    }

    #[cfg(test)]
    pub(super) fn at(dir: &Path) -> Self {
        Self(dir.into())
    }

    pub(super) fn dir_of(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The VMs in alphabetical order. A directory without a readable description is told about and left alone.
    pub(super) fn all(&self) -> Result<Vec<Vm>, Failure> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(host(self.0.display())(e)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| !n.starts_with('.'))
            .collect();
        names.sort();
        let mut vms = Vec::new();
        for name in names {
            match self.get(&name) {
                Ok(vm) => vms.extend(vm),
                Err(e) => tracing::warn!("{}", e.message),
            }
        }
        Ok(vms)
    }

    /// The VM of the name, if there is one.
    pub(super) fn get(&self, name: &str) -> Result<Option<Vm>, Failure> {
        if check_name(name).is_err() {
            return Ok(None);
        }
        let dir = self.dir_of(name);
        let path = dir.join(DESCRIPTION);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(host(path.display())(e)),
        };
        let description =
            serde_json::from_slice(&text).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
        Ok(Some(Vm { name: name.into(), dir, description }))
    }

    /// The VM of the name, or an error that names the nearest.
    pub(super) fn find(&self, name: &str) -> Result<Vm, Failure> {
        if let Some(vm) = self.get(name)? {
            return Ok(vm);
        }
        let all = self.all()?;
        let hint = match base::nearest(name, all.iter().map(|v| v.name.as_str())) {
            Some(near) => format!("did you mean '{near}'?"),
            None => "'kvasir ls' lists them, 'kvasir create' makes one".into(),
        };
        Err(Failure::usage(format!("there is no VM '{name}'; {hint}")))
    }

    /// Makes a VM: `fill` puts its files into a directory that gets its name only when all is done.
    pub(super) fn add(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<Description, Failure>,
    ) -> Result<Vm, Failure> {
        check_name(name)?;
        let dir = self.dir_of(name);
        let taken =
            || Failure::usage(format!("there is a VM '{name}' already; 'kvasir rm {name}' removes it"));
        if dir.exists() {
            return Err(taken());
        }
        fs::create_dir_all(&self.0).map_err(host(self.0.display()))?;
        let unfinished = tempfile::Builder::new()
            .prefix(&format!(".{name}-"))
            .tempdir_in(&self.0)
            .map_err(host(self.0.display()))?;
        let description = fill(unfinished.path())?;
        let text = serde_json::to_string_pretty(&description).map_err(Failure::usage)?;
        let path = unfinished.path().join(DESCRIPTION);
        // It may hold a password.
        let file = File::options().create(true).write(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut f| f.write_all((text + "\n").as_bytes())).map_err(host(path.display()))?;
        // Fails where another process has made one of the same name meanwhile.
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            unfinished.path(),
            rustix::fs::CWD,
            &dir,
            rustix::fs::RenameFlags::NOREPLACE,
        )
        .map_err(|e| if e == rustix::io::Errno::EXIST { taken() } else { host(dir.display())(e.into()) })?;
        let _ = unfinished.keep(); // it has moved
        Ok(Vm { name: name.into(), dir, description })
    }
}

/// Held while a VM runs.
pub(super) struct Running {
    _lock: File,
}

impl Vm {
    fn lock_file(&self) -> Result<File, Failure> {
        let path = self.dir.join(LOCK);
        File::options().create(true).write(true).truncate(false).open(&path).map_err(host(path.display()))
    }

    /// Marks the VM as running, for as long as the result lives.
    pub(super) fn run(&self) -> Result<Running, Failure> {
        let lock = self.lock_file()?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Running { _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(Failure::usage(format!("'{}' is running already", self.name)))
            }
            Err(e) => Err(host(self.dir.display())(e.into())),
        }
    }

    /// Whether it runs.
    pub(super) fn is_running(&self) -> bool {
        self.lock_file().is_ok_and(|lock| {
            flock(&lock, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
        })
    }

    /// Removes it, with its disk.
    pub(super) fn remove(self) -> Result<(), Failure> {
        let _running = self.run()?;
        // Out of sight at once, then gone piece by piece.
        let hidden = self.dir.with_file_name(format!(".removed-{}-{}", self.name, std::process::id()));
        fs::rename(&self.dir, &hidden).map_err(host(self.dir.display()))?;
        fs::remove_dir_all(&hidden).map_err(host(hidden.display()))
    }

    /// Tells the user how to log in, on standard error.
    pub(super) fn say_how_to_log_in(&self) {
        if let Some(command) = self.ssh_command() {
            eprintln!("kvasir: to log in: {command}");
        }
        if let Some(Ssh { user, password: Some(password), .. }) = &self.description.ssh {
            eprintln!("kvasir: on the console: user {user}, password {password}");
        }
    }

    /// The command that logs in.
    pub(super) fn ssh_command(&self) -> Option<String> {
        let ssh = self.description.ssh.as_ref()?;
        let key = ssh.key.as_ref().map(|k| format!(" -i {}", self.dir.join(k).display())).unwrap_or_default();
        let known = self.dir.join("known_hosts");
        Some(format!(
            "ssh -p {}{key} -o UserKnownHostsFile={} -o StrictHostKeyChecking=accept-new {}@127.0.0.1",
            ssh.port,
            known.display(),
            ssh.user
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        Description {
            from: "debian:12".into(),
            memory: "1G".into(),
            cpus: "2".into(),
            firmware: "bios".into(),
            disk: Some("disk.qcow2".into()),
            seed: None,
            cdrom: None,
            ssh: Some(Ssh { port: 2222, user: "ann".into(), key: None, password: None }),
            arguments: Vec::new(),
        }
    }

    #[test]
    fn a_vm_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        assert!(store.all().unwrap().is_empty());
        let failed = store.add("web", |_| Err(Failure::usage("no")));
        assert_eq!(failed.err().map(|f| f.message).as_deref(), Some("no"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half-done");

        store.add("web", |_| Ok(description())).ok().unwrap();
        assert_eq!(store.get("web").unwrap().unwrap().description, description());
        let again = store.add("web", |_| Ok(description())).err().unwrap();
        assert!(again.message.contains("kvasir rm web"), "{}", again.message);
        let near = store.find("wed").err().unwrap();
        assert!(near.message.contains("did you mean 'web'?"), "{}", near.message);
    }

    #[test]
    fn a_running_vm_is_neither_started_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let vm = store.add("web", |_| Ok(description())).ok().unwrap();
        assert!(!vm.is_running());
        let running = vm.run().ok().unwrap();
        assert!(vm.is_running());
        assert!(vm.run().is_err());
        assert!(vm.clone().remove().is_err_and(|f| f.message.contains("running")));
        assert!(store.get("web").ok().unwrap().is_some());
        drop(running);
        vm.remove().ok().unwrap();
        assert!(store.all().ok().unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn names() {
        for bad in ["", ".", "..", ".a", "a/b", "-a", "a b", &"a".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for good in ["a", "web-1.example", "9", &"a".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
    }
}
