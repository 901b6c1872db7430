//! QEMU's disk image tools to compare with: those of `$KVASIR_QEMU_BIN`, or the newest that Debian offers for this release
//! (backports included), unpacked in the cache, or those that are installed.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::paths;

/// The directory with `qemu-img`, `qemu-nbd` and `qemu-io`.
pub fn tools() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("KVASIR_QEMU_BIN") {
        return Ok(dir.into());
    }
    match backports() {
        Ok(dir) => return Ok(dir),
        Err(e) => eprintln!("xtask: no QEMU tools from backports ({e:#}); using the installed ones"),
    }
    let path = std::env::var_os("PATH").context("PATH is not set")?;
    match std::env::split_paths(&path).find(|dir| dir.join("qemu-img").is_file()) {
        Some(dir) => Ok(dir),
        None => bail!("qemu-img: not found; as root, run: apt-get install qemu-utils"),
    }
}

fn works(dir: &Path) -> bool {
    Command::new(dir.join("qemu-img")).arg("--version").output().is_ok_and(|o| o.status.success())
}

/// Fetches the tools of the release's backports with lists of its own, so that it needs no root and leaves the system's alone.
fn backports() -> Result<PathBuf> {
    let root = paths::cache()?.join("qemu-tools");
    let bin = root.join("files/usr/bin");
    if works(&bin) {
        return Ok(bin);
    }
    let release = std::fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let codename = release.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("this is no release of Debian")?.trim_matches('"');
    // The mirror is the one that the system uses.
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"])
        .output()
        .context("apt-get: cannot run")?;
    let targets = String::from_utf8_lossy(&targets.stdout).into_owned();
    let mirror = targets.lines().find_map(|l| l.strip_prefix(codename)?.strip_prefix(' '));
    let mirror = mirror.with_context(|| format!("apt has no source for {codename}"))?;
    const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let signed = if Path::new(KEYS).exists() { format!("[signed-by={KEYS}] ") } else { String::new() };
    for dir in ["lists/partial", "cache/archives/partial", "files"] {
        std::fs::create_dir_all(root.join(dir)).with_context(|| root.display().to_string())?;
    }
    std::fs::write(root.join("sources.list"), format!("deb {signed}{mirror} {codename}-backports main\n"))?;
    let options = [
        format!("Dir::Etc::sourcelist={}", root.join("sources.list").display()),
        "Dir::Etc::sourceparts=/dev/null".into(),
        format!("Dir::State::lists={}", root.join("lists").display()),
        format!("Dir::Cache={}", root.join("cache").display()),
        // As root apt would switch to a user who cannot write here.
        "APT::Sandbox::User=root".into(),
    ];
    let apt = |words: &[&str]| -> Result<()> {
        let mut command = Command::new("apt-get");
        command.arg("-q").args(options.iter().flat_map(|o| ["-o", o])).args(words).current_dir(&root);
        let output = command.output().context("apt-get: cannot run")?;
        ensure!(
            output.status.success(),
            "apt-get {words:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(())
    };
    apt(&["update"])?;
    apt(&["download", "qemu-utils"])?;
    let name = |e: std::io::Result<std::fs::DirEntry>| e.ok().map(|e| e.path());
    let deb = std::fs::read_dir(&root)?
        .filter_map(name)
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded nothing")?;
    let unpacked = Command::new("dpkg-deb").arg("-x").arg(&deb).arg(root.join("files")).status();
    ensure!(unpacked.context("dpkg-deb: cannot run")?.success(), "{}: cannot be unpacked", deb.display());
    std::fs::remove_file(&deb)?;
    ensure!(works(&bin), "{}: does not run on this system", bin.display());
    Ok(bin)
}

/// Prints the directory, for `KVASIR_QEMU_BIN=$(cargo xtask qemu-tools)`.
pub fn task() -> Result<ExitCode> {
    println!("{}", tools()?.display());
    Ok(ExitCode::SUCCESS)
}
