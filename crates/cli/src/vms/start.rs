//! `kvasir start VM`: `kvasir run` with what the VM's description says.

use super::create;
use super::store::{Description, Store, Vm};
use crate::{Failure, run};
use clap::Parser;
use std::ffi::OsString;

/// Start a virtual machine made with `create`, in this terminal.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name
    #[arg(value_name = "VM")]
    name: String,
    /// More arguments of 'kvasir run', for this start only
    #[arg(last = true, value_name = "ARGUMENTS")]
    more: Vec<String>,
}

/// The arguments of `kvasir run` alone.
#[derive(Parser)]
#[command(name = "kvasir run", args_override_self = true)]
struct Run {
    #[command(flatten)]
    args: run::Args,
}

pub(crate) fn main(args: &Args) -> Result<u8, Failure> {
    let more: Vec<OsString> = args.more.iter().map(OsString::from).collect();
    start(&Store::open()?.find(&args.name)?, &more)
}

/// `kvasir run NAME`: the VM of the name, made first where the name is that of a distribution.
pub(crate) fn named(name: &str, more: &[OsString]) -> Result<u8, Failure> {
    let store = Store::open()?;
    // `debian:13` would do as a name of the disk's source, but not of a VM.
    let kept = name.replace(':', "-");
    if let Some(vm) = store.get(&kept)? {
        return start(&vm, more);
    }
    let vm = match guest::debian::Release::parse(name).map_err(Failure::usage)? {
        Some(_) => create::make(&create::Args::plain(&kept, name))?,
        None => store.find(name)?,
    };
    start(&vm, more)
}

fn start(vm: &Vm, more: &[OsString]) -> Result<u8, Failure> {
    let _running = vm.run()?;
    let own = std::iter::once("kvasir run".to_owned()).chain(arguments(vm)).map(OsString::from);
    let run = Run::try_parse_from(own.chain(more.iter().cloned())).map_err(|e| {
        Failure::usage(format!("'{}': {}", vm.name, e.to_string().trim_start_matches("error: ")))
    })?;
    vm.say_how_to_log_in();
    run::main(&run.args)
}

/// Refuses arguments that a later start would refuse.
pub(super) fn check_run(memory: &str, cpus: &str, more: &[String]) -> Result<(), Failure> {
    let argv = ["kvasir run", "--memory", memory, "--cpus", cpus].map(String::from);
    let run = Run::try_parse_from(argv.into_iter().chain(more.iter().cloned()))
        .map_err(|e| Failure::usage(e.to_string().trim_start_matches("error: ").trim_end()))?;
    run.args.check()
}

/// A path for an option that splits its value at commas.
fn path(vm: &Vm, file: &std::path::Path) -> String {
    vm.dir.join(file).to_string_lossy().replace(',', ",,")
}

fn arguments(vm: &Vm) -> Vec<String> {
    let d: &Description = &vm.description;
    let mut out: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| out.extend([name.to_owned(), value]);
    option("--name", vm.name.clone());
    option("--memory", d.memory.clone());
    option("--cpus", d.cpus.clone());
    let vars = if d.firmware == "uefi" {
        format!(",vars={}", path(vm, "uefi-vars.fd".as_ref()))
    } else {
        String::new()
    };
    option("--firmware", d.firmware.clone() + &vars);
    if let Some(disk) = &d.disk {
        option("--disk", path(vm, disk));
    }
    if let Some(seed) = &d.seed {
        option("--disk", format!("{},format=raw,read-only", path(vm, seed)));
    }
    if let Some(iso) = &d.cdrom {
        option("--cdrom", path(vm, iso));
    }
    let forward =
        d.ssh.as_ref().map(|s| format!(",hostfwd=tcp:127.0.0.1:{}-:22", s.port)).unwrap_or_default();
    option("--net", format!("user{forward}"));
    out.extend(d.arguments.iter().cloned());
    out
}

#[cfg(test)]
mod tests {
    use super::super::store::Ssh;
    use super::*;

    #[test]
    fn a_description_becomes_arguments_that_run_takes() {
        let vm = Vm {
            name: "web".into(),
            dir: "/vms/we,b".into(),
            description: Description {
                from: "debian:12".into(),
                memory: "1G".into(),
                cpus: "2".into(),
                firmware: "uefi".into(),
                disk: Some("disk.qcow2".into()),
                seed: Some("seed.img".into()),
                cdrom: Some("/iso/x.iso".into()),
                ssh: Some(Ssh { port: 2222, user: "ann".into(), key: Some("id".into()), password: None }),
                arguments: vec!["--no-reboot".into()],
            },
        };
        let text = arguments(&vm).join(" ");
        assert_eq!(
            text,
            "--name web --memory 1G --cpus 2 --firmware uefi,vars=/vms/we,,b/uefi-vars.fd \
             --disk /vms/we,,b/disk.qcow2 --disk /vms/we,,b/seed.img,format=raw,read-only --cdrom /iso/x.iso \
             --net user,hostfwd=tcp:127.0.0.1:2222-:22 --no-reboot"
        );
        let argv = std::iter::once("run".to_owned()).chain(arguments(&vm));
        assert!(Run::try_parse_from(argv).is_ok());
        let ssh = vm.ssh_command().unwrap();
        assert!(ssh.starts_with("ssh -p 2222 -i /vms/we,b/id ") && ssh.ends_with(" ann@127.0.0.1"), "{ssh}");
    }
}
