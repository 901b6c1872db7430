//! The peers: QEMU as it is installed, and the newest that Debian's backports have, unpacked beside the system.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::paths;

const PACKAGE: &str = "qemu-system-x86";
const LIBRARIES: &[&str] = &["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// A QEMU and how to start it.
pub struct Qemu {
    /// Version, such as `7.2.22`.
    pub version: String,
    command: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Qemu {
    /// The installed one.
    pub fn installed(program: &str) -> Result<Qemu> {
        let mut qemu =
            Qemu { version: String::new(), command: vec![program.to_owned()], environment: Vec::new() };
        qemu.version = qemu.ask().with_context(|| {
            format!(
                "{program}: cannot run; as root, run: apt-get install {PACKAGE}, or name another with --qemu"
            )
        })?;
        Ok(qemu)
    }

    /// The newest of the backports suite that belongs to this system, fetched into the cache.
    pub fn newest() -> Result<Qemu> {
        let _lock = paths::lock_cache()?;
        let directory = paths::cache()?.join("qemu-backports");
        let root = directory.join("root");
        if !root.is_dir() {
            fetch(&directory, &root)?;
        }
        let path = |name: &str| root.join(name).display().to_string();
        let libraries: Vec<String> = LIBRARIES.iter().map(|name| path(name)).collect();
        let mut qemu = Qemu {
            version: String::new(),
            command: vec![
                path("lib64/ld-linux-x86-64.so.2"),
                "--library-path".into(),
                libraries.join(":"),
                path("usr/bin/qemu-system-x86_64"),
                "-L".into(),
                path("usr/share/qemu"),
                "-L".into(),
                path("usr/share/seabios"),
            ],
            environment: vec![("QEMU_MODULE_DIR".into(), path("usr/lib/x86_64-linux-gnu/qemu"))],
        };
        qemu.version = qemu.ask().with_context(|| directory.display().to_string())?;
        Ok(qemu)
    }

    /// The command without arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).envs(self.environment.iter().cloned());
        command
    }

    fn ask(&self) -> Result<String> {
        let output = self.command().arg("--version").output().context("cannot run")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        parse_version(&text).with_context(|| format!("not a QEMU: {text}{said}"))
    }
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(text: &str) -> Option<String> {
    text.split_once("version ")?.1.split_whitespace().next().map(str::to_owned)
}

/// Where apt gets this release of Debian from: address and code name of a suite that has backports.
fn mirror() -> Result<(String, String)> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(CODENAME) $(LABEL)", "Created-By: Packages"])
        .output()
        .context("apt-get: cannot run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_mirror(&text).context("no Debian package lists; as root, run: apt-get update")
}

fn parse_mirror(text: &str) -> Option<(String, String)> {
    text.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            [address, name, "Debian"] if !name.contains('-') => Some((address.to_owned(), name.to_owned())),
            _ => None,
        }
    })
}

/// Downloads the package with everything it depends on, as if nothing were installed, and unpacks it. Apt works on
/// directories of its own: the system's lists and packages are not touched.
fn fetch(directory: &Path, root: &Path) -> Result<()> {
    let (address, name) = mirror()?;
    eprintln!("xtask: downloading {PACKAGE} of {name}-backports");
    for below in ["lists/partial", "archives/partial", "cache"] {
        std::fs::create_dir_all(directory.join(below)).with_context(|| directory.display().to_string())?;
    }
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let list: String = [name.clone(), format!("{name}-backports")]
        .iter()
        .map(|suite| format!("deb [signed-by={keys}] {address} {suite} main\n"))
        .collect();
    std::fs::write(directory.join("sources.list"), list)?;
    std::fs::write(directory.join("status"), "")?;
    apt(directory, &["update"])?;
    let suite = format!("{name}-backports");
    apt(directory, &["--no-install-recommends", "-y", "-d", "-t", &suite, "install", PACKAGE])?;
    let partial = directory.join("root.partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial)?;
    }
    std::fs::create_dir_all(&partial)?;
    let archives: Vec<PathBuf> = std::fs::read_dir(directory.join("archives"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    ensure!(!archives.is_empty(), "{}: apt downloaded nothing", directory.display());
    for archive in &archives {
        let status = Command::new("dpkg-deb").arg("-x").arg(archive).arg(&partial).status();
        ensure!(
            status.context("dpkg-deb: cannot run")?.success(),
            "{}: dpkg-deb cannot unpack it",
            archive.display()
        );
    }
    std::fs::rename(&partial, root)?;
    std::fs::remove_dir_all(directory.join("archives"))?;
    Ok(())
}

fn apt(directory: &Path, arguments: &[&str]) -> Result<()> {
    let path = |name: &str| directory.join(name).display().to_string();
    let settings = [
        format!("Dir::Etc::sourcelist={}", path("sources.list")),
        "Dir::Etc::sourceparts=/dev/null".into(),
        format!("Dir::State::lists={}", path("lists")),
        format!("Dir::State::status={}", path("status")),
        format!("Dir::Cache={}", path("cache")),
        format!("Dir::Cache::archives={}", path("archives")),
        "APT::Sandbox::User=root".into(),
        "Acquire::Languages=none".into(),
        "Acquire::Retries=3".into(),
        "Debug::NoLocking=1".into(),
    ];
    let mut apt = Command::new("apt-get");
    apt.arg("-q");
    for setting in &settings {
        apt.args(["-o", setting]);
    }
    let output = apt.args(arguments).output().context("apt-get: cannot run")?;
    if !output.status.success() {
        bail!("apt-get {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_and_apt_say() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1)\n").as_deref(), Some("7.2.22"));
        assert_eq!(parse_version("nonsense"), None);
        let lists = "http://a/x nodistro Node\nhttp://m/debian/ bookworm-updates Debian\nhttp://m/debian/ bookworm Debian\n";
        assert_eq!(parse_mirror(lists), Some(("http://m/debian/".into(), "bookworm".into())));
    }
}
