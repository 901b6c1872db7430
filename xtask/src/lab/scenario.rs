//! Scenarios: shell scripts in `lab/scenarios`, described by the comment they start with.
//!
//! The first comment line is the description. Further lines of the form `# key: value` say what the scenario needs:
//!
//! | key | value | without it |
//! | --- | --- | --- |
//! | `needs` | any of `kvasir`, `guest`, `tiny`, `qemu`, `stopwatch` | nothing |
//! | `modules` | kernel modules to load beside KVM | none |
//! | `cpus` | processors of the lab host | 2 |
//! | `memory` | memory of the lab host, MiB | 2048 |
//! | `timeout` | seconds until it is given up | 300 |
//! | `qemu` | more arguments for the lab host's QEMU | none |
//! | `icount` | `yes`: the lab host's clock counts instructions (one processor) | no |
//! | `lab-only` | `yes`: never run directly on this host | no |
//! | `default` | `no`: run only when named | yes |

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::paths;

const MATERIAL: &[&str] = &["kvasir", "guest", "tiny", "qemu", "stopwatch"];

/// What the head of a scenario file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scenario {
    pub name: String,
    pub path: PathBuf,
    pub description: String,
    pub needs: Vec<String>,
    pub modules: Vec<String>,
    pub cpus: u32,
    pub memory: u32,
    pub timeout: u64,
    pub qemu: Vec<String>,
    pub icount: bool,
    pub lab_only: bool,
    pub default: bool,
}

impl Scenario {
    /// Whether it asked for this material.
    pub fn needs(&self, what: &str) -> bool {
        self.needs.iter().any(|need| need == what)
    }

    /// Reads a scenario file.
    pub fn read(path: &Path) -> Result<Scenario> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Scenario::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Scenario> {
        let name = path.file_stem().context("no name")?.to_string_lossy().into_owned();
        let mut scenario = Scenario {
            name,
            path: path.to_path_buf(),
            cpus: 2,
            memory: 2048,
            timeout: 300,
            default: true,
            ..Scenario::default()
        };
        let head =
            text.lines().take_while(|line| line.starts_with('#')).filter(|line| !line.starts_with("#!"));
        for line in head {
            let line = line.trim_start_matches('#').trim();
            if scenario.description.is_empty() {
                scenario.description = line.to_owned();
            } else if let Some((key, value)) = line.split_once(": ").filter(|(key, _)| !key.contains(' ')) {
                scenario.set(key, value.trim()).with_context(|| format!("{}: # {line}", path.display()))?;
            }
        }
        if scenario.description.is_empty() {
            bail!("{}: must start with a comment that describes it", path.display());
        }
        Ok(scenario)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let words = || value.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let flag = || match value {
            "yes" => Ok(true),
            "no" => Ok(false),
            _ => bail!("must be yes or no"),
        };
        match key {
            "needs" => {
                self.needs = words();
                if let Some(unknown) = self.needs.iter().find(|need| !MATERIAL.contains(&need.as_str())) {
                    bail!("unknown material {unknown}; there is {}", MATERIAL.join(", "));
                }
            }
            "modules" => self.modules = words(),
            "cpus" => self.cpus = value.parse()?,
            "memory" => self.memory = value.parse()?,
            "timeout" => self.timeout = value.parse()?,
            "qemu" => self.qemu.extend(words()),
            "icount" => self.icount = flag()?,
            "lab-only" => self.lab_only = flag()?,
            "default" => self.default = flag()?,
            _ => bail!("unknown key {key}"),
        }
        Ok(())
    }
}

/// The directory of the lab's scripts.
pub fn directory() -> PathBuf {
    paths::workspace().join("lab")
}

/// All scenarios, by name.
pub fn all() -> Result<Vec<Scenario>> {
    let directory = directory().join("scenarios");
    let mut scenarios = Vec::new();
    for entry in std::fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sh") {
            scenarios.push(Scenario::read(&path)?);
        }
    }
    scenarios.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(scenarios)
}

/// The chosen scenarios: those named, or the default set. What contains a slash is a file of its own.
pub fn choose(mut all: Vec<Scenario>, names: &[String]) -> Result<Vec<Scenario>> {
    if names.is_empty() {
        all.retain(|scenario| scenario.default);
        return Ok(all);
    }
    let known = all.iter().map(|scenario| scenario.name.clone()).collect::<Vec<_>>().join(", ");
    let find = |name: &String| {
        if name.contains('/') {
            return Scenario::read(Path::new(name));
        }
        let found = all.iter().position(|scenario| scenario.name == *name);
        let index = found.with_context(|| format!("no scenario {name} (named twice?); there is {known}"))?;
        Ok(all.swap_remove(index))
    };
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Scenario> {
        Scenario::parse(Path::new("/x/two-hosts.sh"), text)
    }

    #[test]
    fn reads_the_head() {
        let text = "#!/bin/sh\n# Boots things.\n#\n# A note: not a key.\n# needs: kvasir guest\n# cpus: 4\n# icount: yes\n\
                    # qemu: -device edu\n\n# memory: 1\n";
        let scenario = parse(text).expect("parses");
        assert_eq!(scenario.name, "two-hosts");
        assert_eq!(scenario.description, "Boots things.");
        assert!(scenario.needs("guest") && !scenario.needs("qemu"));
        assert_eq!((scenario.cpus, scenario.memory), (4, 2048));
        assert!(scenario.icount && scenario.default && !scenario.lab_only);
        assert_eq!(scenario.qemu, ["-device", "edu"]);
    }

    #[test]
    fn mistakes_are_errors() {
        assert!(parse("echo\n").is_err());
        assert!(parse("# Text.\n# need: kvasir\n").is_err());
        assert!(parse("# Text.\n# needs: coffee\n").is_err());
        assert!(parse("# Text.\n# icount: maybe\n").is_err());
        assert!(parse("# Text.\n# cpus: many\n").is_err());
    }

    #[test]
    fn the_scenarios_here_are_well_formed() {
        let all = all().expect("every head parses");
        assert!(all.iter().any(|scenario| scenario.name == "boot" && scenario.default));
        assert!(choose(all, &["no-such".to_owned()]).is_err());
        let names =
            |chosen: Vec<Scenario>| chosen.into_iter().map(|scenario| scenario.name).collect::<Vec<_>>();
        assert!(
            names(choose(super::all().expect("again"), &[]).expect("default set"))
                .contains(&"boot".to_owned())
        );
        let two = ["reference", "boot"].map(str::to_owned);
        assert_eq!(names(choose(super::all().expect("again"), &two).expect("two")), two);
    }
}
