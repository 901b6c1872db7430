//! The lab: scenarios on the real KVM module, inside an emulated host where the machine has no usable one.
//!
//! See `docs/lab.md`.

mod host;
pub mod programs;
mod run;
mod scenario;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{guest, paths, tiny};
use host::Host;
use run::Outcome;
use scenario::Scenario;

#[derive(clap::Args)]
pub struct Options {
    /// Scenarios to run, or files of such (with a slash in their name); those of the default set if none is named
    scenarios: Vec<String>,
    /// List the scenarios
    #[arg(long)]
    list: bool,
    /// Use the lab host even where this host could run the scenarios itself
    #[arg(long)]
    nested: bool,
    /// Make the lab host's clock count instructions, whatever the scenario says
    #[arg(long)]
    icount: bool,
    /// Keep the lab host's image and say how to start it
    #[arg(long)]
    keep: bool,
    /// Leave the user at a shell in the lab host, set up as for the (first) named scenario
    #[arg(long)]
    shell: bool,
    /// The kvasir program to test, instead of building one
    #[arg(long, value_name = "FILE")]
    kvasir: Option<PathBuf>,
}

/// The files scenarios work with, on this machine.
pub struct Material {
    pub guest: guest::Guest,
    /// The smallest guest, see [`tiny`].
    pub tiny: PathBuf,
    pub kvasir: Option<PathBuf>,
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let all = scenario::all()?;
    if options.list {
        for scenario in &all {
            let mark = if scenario.default { "" } else { " (only when named)" };
            println!("{:<16} {}{mark}", scenario.name, scenario.description);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let chosen = scenario::choose(all, &options.scenarios)?;
    let material = prepare(&chosen, options.kvasir.clone())?;
    if options.shell {
        let scenario = chosen.first().context("no scenario")?;
        let host = Host::build(scenario, &material, options.icount, true)?;
        let status = run::interactive(&host)?;
        host.remove()?;
        return Ok(status);
    }
    let mut failed = Vec::new();
    for scenario in &chosen {
        let outcome = if run_directly(scenario, options) {
            run::direct(scenario, &material)?
        } else {
            nested(scenario, &material, options)?
        };
        eprintln!("xtask: lab {}: {outcome}", scenario.name);
        if outcome != Outcome::Finished(0) {
            failed.push(scenario.name.as_str());
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("xtask: lab: failed: {}", failed.join(" "));
    Ok(ExitCode::FAILURE)
}

/// Runs a scenario in the lab host; again when the lab host itself, not the scenario, came to grief.
fn nested(scenario: &Scenario, material: &Material, options: &Options) -> Result<Outcome> {
    const ATTEMPTS: usize = 3;
    let host = Host::build(scenario, material, options.icount, false)?;
    let limit = Duration::from_secs(scenario.timeout);
    let mut attempt = 1;
    let outcome = loop {
        let outcome = run::in_host(&host, &scenario.name, limit)?;
        if matches!(outcome, Outcome::Finished(_)) || attempt == ATTEMPTS {
            break outcome;
        }
        eprintln!("xtask: lab {}: {outcome}; trying once more", scenario.name);
        attempt += 1;
    };
    if options.keep {
        eprintln!("xtask: the lab host is kept; start it with:\n{}", host.keep(&scenario.name)?);
    } else {
        host.remove()?;
    }
    Ok(outcome)
}

fn run_directly(scenario: &Scenario, options: &Options) -> bool {
    !options.nested && !options.icount && !scenario.lab_only && has_hardware_kvm()
}

/// Whether `/dev/kvm` here is the processor's own virtualization and may be used.
///
/// The device alone is no proof: builds of KVM exist that run guests by page-table tricks and an instruction
/// emulator, and cannot boot an ordinary kernel.
fn has_hardware_kvm() -> bool {
    let Ok(cpuinfo) = std::fs::read_to_string("/proc/cpuinfo") else { return false };
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let virtualization = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    virtualization && std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn prepare(scenarios: &[Scenario], kvasir: Option<PathBuf>) -> Result<Material> {
    let guest = guest::prepare(false)?;
    let directory = paths::cache()?.join("lab");
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let tiny = directory.join("tiny");
    paths::write_atomically(&tiny, &tiny::kernel("KVASIR-GUEST-READY"))?;
    let kvasir = match kvasir {
        Some(path) => Some(path.canonicalize().with_context(|| path.display().to_string())?),
        None if scenarios.iter().any(|scenario| scenario.needs("kvasir")) => Some(build_kvasir()?),
        None => None,
    };
    Ok(Material { guest, tiny, kvasir })
}

/// Builds the release program and returns its path.
pub fn build_kvasir() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--package",
            "kvasir",
            "--bin",
            "kvasir",
            "--message-format=json-render-diagnostics",
        ])
        .current_dir(paths::workspace())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo: cannot run")?;
    ensure!(output.status.success(), "kvasir does not build");
    let messages = String::from_utf8_lossy(&output.stdout);
    match executable_in(&messages) {
        Some(path) => Ok(path),
        None => bail!("cargo named no program it built"),
    }
}

/// Finds `"executable":"..."` in cargo's messages.
fn executable_in(messages: &str) -> Option<PathBuf> {
    let line = messages.lines().rev().find(|line| line.contains("\"executable\":\""))?;
    let path = line.split("\"executable\":\"").nth(1)?.split('"').next()?;
    Some(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cargo_messages() {
        let messages = "{\"reason\":\"x\",\"executable\":null}\n{\"target\":{},\"executable\":\"/t/release/kvasir\",\"f\":1}\n";
        assert_eq!(executable_in(messages), Some(PathBuf::from("/t/release/kvasir")));
        assert_eq!(executable_in("{}"), None);
    }
}
