//! Debian packages, fetched and unpacked without root and without installing them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::paths;

/// A package as the package lists describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub architecture: String,
    depends: Vec<String>,
}

impl Package {
    /// Looks up the version of a package that would be installed; `None` when the lists do not know it.
    pub fn find(name: &str) -> Result<Option<Package>> {
        let output = Command::new("apt-cache")
            .args(["show", "--no-all-versions", name])
            .output()
            .context("apt-cache: cannot run; the lab and the test guest are made from Debian packages")?;
        Ok(parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// As [`find`](Self::find), with the remedy when there is none.
    pub fn require(name: &str) -> Result<Package> {
        match Self::find(name)? {
            Some(package) => Ok(package),
            None => bail!("{name}: not in the package lists; as root, run: apt-get update"),
        }
    }

    /// The real package behind a metapackage: its first dependency whose name starts with `prefix`.
    pub fn behind(&self, prefix: &str) -> Result<Package> {
        let real = self.depends.iter().find(|name| name.starts_with(prefix));
        let real = real.with_context(|| format!("{}: depends on no package named {prefix}*", self.name))?;
        Self::require(real)
    }

    /// Name, version and architecture, unique and fit for a file name.
    pub fn label(&self) -> String {
        format!("{}_{}_{}", self.name, self.version.replace(':', "%3a"), self.architecture)
    }

    /// The package's files, unpacked in the cache; fetched first when they are not there yet.
    pub fn unpacked(&self) -> Result<PathBuf> {
        let packages = paths::cache()?.join("packages");
        let tree = packages.join(self.label());
        if tree.is_dir() {
            return Ok(tree);
        }
        std::fs::create_dir_all(&packages).with_context(|| packages.display().to_string())?;
        let deb = self.download(&packages)?;
        let partial = packages.join(format!("{}.partial", self.label()));
        if partial.exists() {
            std::fs::remove_dir_all(&partial).with_context(|| partial.display().to_string())?;
        }
        let status = Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&partial).status();
        ensure!(
            status.context("dpkg-deb: cannot run")?.success(),
            "{}: dpkg-deb cannot unpack it",
            deb.display()
        );
        std::fs::rename(&partial, &tree).with_context(|| tree.display().to_string())?;
        std::fs::remove_file(&deb).with_context(|| deb.display().to_string())?;
        Ok(tree)
    }

    fn download(&self, into: &Path) -> Result<PathBuf> {
        let deb = into.join(format!("{}.deb", self.label()));
        if deb.is_file() {
            return Ok(deb);
        }
        eprintln!("xtask: downloading {} {}", self.name, self.version);
        let output = Command::new("apt-get")
            // As root apt would switch to a user who cannot write here, and warn that it did not.
            .args(["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download"])
            .arg(format!("{}={}", self.name, self.version))
            .current_dir(into)
            .output()
            .context("apt-get: cannot run")?;
        ensure!(
            output.status.success() && deb.is_file(),
            "{} {}: cannot download; are the package lists current (as root: apt-get update)?\n{}",
            self.name,
            self.version,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(deb)
    }
}

/// Reads the first paragraph of `apt-cache show`.
fn parse(text: &str) -> Option<Package> {
    let paragraph = text.split("\n\n").next()?;
    let field = |name: &str| {
        let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(|value| value.trim().to_owned())
    };
    let depends = field("Depends").unwrap_or_default();
    let first_word = |entry: &str| entry.split_whitespace().next().map(str::to_owned);
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        architecture: field("Architecture")?,
        depends: depends.split(',').filter_map(first_word).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_first_paragraph() {
        let text = "Package: linux-image-cloud-amd64\nSource: x (1)\nVersion: 6.1.192-2\nArchitecture: amd64\n\
                    Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), linux-base\n\nPackage: other\nVersion: 1\n";
        let package = parse(text).expect("a package");
        assert_eq!(package.label(), "linux-image-cloud-amd64_6.1.192-2_amd64");
        assert_eq!(package.depends, ["linux-image-6.1.0-56-cloud-amd64", "linux-base"]);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn an_epoch_is_escaped_as_apt_does() {
        let text = "Package: busybox-static\nVersion: 1:1.35.0-4\nArchitecture: amd64\n";
        assert_eq!(parse(text).expect("a package").label(), "busybox-static_1%3a1.35.0-4_amd64");
    }
}
