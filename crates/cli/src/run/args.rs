//! Arguments of `kvasir run`, and the blueprint they describe.

use super::disks;
use super::net;
use crate::terminal::Stdio;
use crate::{Failure, chardev};
use base::props::{Bag, Properties, parse_keyval};
use bus::Chardev;
use devices::{find_model, models};
use display::FrontEnd;
use display::input::Keymap;
use machine::blueprint::{Blueprint, BoardSpec, MemorySpec};

use machine::control::{Actions, RebootAction};
use machine::kernel::{EntryMode, KernelSpec};
use machine::topology::SmpSpec;
use machine::{BOARDS, Chardevs};
use std::path::PathBuf;
use std::sync::Arc;

/// Run a virtual machine in this terminal.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A virtual machine made with 'create', or a distribution to make one of first: debian[:12|:13]
    #[arg(value_name = "VM")]
    pub(crate) vm: Option<String>,
    /// Linux kernel: a bzImage, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "console=ttyS0")]
    append: String,
    /// How to enter the kernel (default: what the image offers)
    #[arg(long, value_name = "MODE", requires = "kernel", value_parser = ["32", "64", "pvh"])]
    entry: Option<String>,
    /// What runs at power-on: auto, bios, uefi, none or FILE[,vars=FILE][,vars-template=FILE]
    #[arg(long, value_name = "KIND[,...]", default_value = "auto")]
    firmware: String,
    /// Boot order: [order=LETTERS][,once=LETTERS][,menu=on][,splash-time=MS][,reboot-timeout=MS][,strict=on]
    #[arg(long, value_name = "ORDER[,...]")]
    boot: Option<String>,
    /// A file for firmware and guest: NAME,string=TEXT or NAME,file=FILE
    #[arg(long, value_name = "NAME,...")]
    fw_cfg: Vec<String>,
    /// Disk image: FILE[,bus=virtio|scsi|sata|ide|nvme|none][,format=raw][,read-only][,serial=][,...]; other properties are
    /// the device's ("--device scsi-hd,help")
    #[arg(long, value_name = "FILE[,...]")]
    disk: Vec<String>,
    /// CD-ROM drive with an ISO image: FILE[,bus=sata|ide|scsi][,...]
    #[arg(long, value_name = "FILE[,...]")]
    cdrom: Vec<String>,
    /// CPU model: NAME[,+feature][,-feature][,property=value]; "help" lists models and features
    #[arg(long, value_name = "NAME[,...]", default_value = "host")]
    cpu: String,
    /// vCPUs: N[,sockets=,dies=,cores=,threads=]
    #[arg(long, short = 'c', value_name = "N[,...]", default_value = "1")]
    cpus: String,
    /// RAM: SIZE[,share][,hugepages][,hugepagesize=][,path=][,prealloc]; MiB without a suffix
    #[arg(long, short, value_name = "SIZE[,...]", default_value = "512M")]
    memory: String,
    /// Accelerator: auto, kvm, or soft[,option=value]
    #[arg(long, value_name = "NAME[,...]", default_value = "auto")]
    accel: String,
    /// Board: q35 or microvm
    #[arg(long, value_name = "NAME[,...]", default_value = "q35")]
    machine: String,
    /// Add a device: NAME[,property=value...]; "help" lists them, "NAME,help" shows the properties
    #[arg(long, value_name = "NAME[,...]")]
    device: Vec<String>,
    /// Add a character device: null or file, as KIND,id=ID[,path=FILE]
    #[arg(long, value_name = "KIND,id=ID")]
    chardev: Vec<String>,
    /// Add a network card: user (the default), none, or another backend, as KIND[,model=virtio-net][,mac=ADDRESS][,...];
    /// "help" lists the kinds, "KIND,help" shows the properties
    #[arg(long, value_name = "KIND[,...]")]
    net: Vec<String>,
    /// Add a network backend for a device: KIND,id=ID[,property=value...]
    #[arg(long, value_name = "KIND,id=ID[,...]")]
    netdev: Vec<String>,
    /// Connect the serial port: stdio (the default unless the screen is in the terminal), none, file:PATH or chardev:ID
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// Graphics card: std, none (default: std where there is a display)
    #[arg(long, value_name = "KIND", value_parser = ["std", "none"])]
    vga: Option<String>,
    /// Show the screen: none, curses (text in this terminal), or vnc=[HOST]:N or vnc=unix:PATH with [,to=][,websocket=][,password=][,tls-creds=]...
    #[arg(long, value_name = "KIND[=...]", default_value = "none")]
    display: String,
    /// Keyboard layout of the guest, for viewers that send characters
    #[arg(long, short = 'k', value_name = "LAYOUT", default_value = "en-us")]
    keymap: String,
    /// Name of the virtual machine
    #[arg(long, default_value = "kvasir")]
    name: String,
    /// End (with status 3) when the guest resets, instead of restarting it
    #[arg(long)]
    no_reboot: bool,
    /// Print the accelerator's counters at the end
    #[arg(long)]
    pub(super) stats: bool,
}

const STDIO: &str = "stdio";

impl Args {
    /// Help that was asked for instead of a run.
    pub(super) fn help_wanted(&self) -> Result<Option<String>, Failure> {
        if let Some(text) = net::help(self.net.iter().chain(&self.netdev))? {
            return Ok(Some(text));
        }
        for text in &self.device {
            if text == "help" || text == "?" {
                return Ok(Some(device_list()));
            }
            let bag = Bag::parse(text, "driver")?;
            if bag.wants_help() {
                let model = find_model(&bag.driver).map_err(Failure::usage)?;
                return Ok(Some(model.all_properties().help(&bag.driver)));
            }
        }
        if matches!(self.cpu.as_str(), "help" | "?") {
            let acceleration = machine::choose(&Bag::parse(&self.accel, "accel")?)?;
            let supported = acceleration.accel.supported_cpuid().map_err(machine::Error::from)?;
            return Ok(Some(machine::cpu::help(&supported)));
        }
        if self.machine == "help" {
            return Ok(Some(BOARDS.iter().map(|b| format!("{:<10} {}\n", b.name, b.about)).collect()));
        }
        let machine = Bag::parse(&self.machine, "type")?;
        Ok(machine.wants_help().then(|| Properties::of::<BoardSpec>().help(&machine.driver)))
    }

    /// Whether the guest's screen is this terminal.
    pub(super) fn is_screen(&self) -> bool {
        self.display == "curses"
    }

    fn serial(&self) -> &str {
        self.serial.as_deref().unwrap_or(if self.is_screen() { "none" } else { STDIO })
    }

    /// The keyboard layout of the guest.
    pub(super) fn keymap(&self) -> Result<Keymap, Failure> {
        Keymap::named(&self.keymap).map_err(Failure::usage)
    }

    /// The front end of the screens.
    pub(super) fn front_end(&self) -> Result<FrontEnd, Failure> {
        let keymap = self.keymap()?;
        if self.is_screen() && self.uses_terminal() {
            return Err(Failure::usage(
                "--display curses takes the terminal: connect the serial port elsewhere (--serial none or file:PATH)",
            ));
        }
        FrontEnd::parse(&self.display, &self.name, keymap).map_err(Failure::usage)
    }

    /// The graphics card that `--vga` and `--display` ask for, unless a device is one already.
    fn graphics(&self) -> Option<Bag> {
        let has = self.device.iter().any(|d| d == "VGA" || d.starts_with("VGA,"));
        match self.vga.as_deref() {
            Some("std") => Some(Bag::new("VGA")),
            None if self.display != "none" && !has => Some(Bag::new("VGA")),
            _ => None,
        }
    }

    /// Whether the guest's console is this terminal.
    pub(super) fn uses_terminal(&self) -> bool {
        self.serial() == STDIO || self.device.iter().any(|d| d.contains("chardev=stdio"))
    }

    /// Character devices by id; `stdio` is always there.
    pub(super) fn chardevs(&self) -> Result<Chardevs, Failure> {
        let mut all = Chardevs::new();
        for text in &self.chardev {
            let (id, chardev) = chardev::open(text)?;
            if id == STDIO || all.insert(id.clone(), chardev).is_some() {
                return Err(Failure::usage(format!(
                    "--chardev {text}: there is a character device '{id}' already"
                )));
            }
        }
        Ok(all)
    }

    /// The blueprint.
    pub(super) fn blueprint(
        &self,
        chardevs: &mut Chardevs,
        stdio: &Arc<Stdio>,
    ) -> Result<Blueprint, Failure> {
        chardevs.insert(STDIO.into(), stdio.clone() as Arc<dyn Chardev>);
        let mut blueprint = Blueprint {
            name: self.name.clone(),
            machine: Bag::parse(&self.machine, "type")?,
            accel: Bag::parse(&self.accel, "accel")?,
            cpu: machine::cpu::parse(&self.cpu)?,
            smp: self.smp()?,
            memory: self.memory()?,
            kernel: self.kernel(),
            firmware: spec_of("--firmware", &self.firmware, "kind")?,
            boot: self
                .boot
                .as_deref()
                .map(|t| spec_of("--boot", t, "order"))
                .transpose()?
                .unwrap_or_default(),
            fw_cfg: self.fw_cfg.iter().map(|t| spec_of("--fw-cfg", t, "name")).collect::<Result<_, _>>()?,
            actions: Actions {
                reboot: if self.no_reboot { RebootAction::Shutdown } else { RebootAction::Reset },
                ..Actions::default()
            },
            ..Blueprint::default()
        };
        match self.serial().split_once(':') {
            None if self.serial() == STDIO => blueprint.serials.push(STDIO.into()),
            None if self.serial() == "none" => {}
            Some(("file", path)) => {
                chardevs.insert("serial0".into(), chardev::file(path.into(), false)?);
                blueprint.serials.push("serial0".into());
            }
            Some(("chardev", id)) => blueprint.serials.push(id.into()),
            _ => {
                return Err(Failure::usage(format!(
                    "--serial {}: use stdio, none, file:PATH or chardev:ID",
                    self.serial()
                )));
            }
        }
        for text in &self.disk {
            disks::add(&mut blueprint, text, false)?;
        }
        for text in &self.cdrom {
            disks::add(&mut blueprint, text, true)?;
        }
        net::add(&self.net, &self.netdev, &mut blueprint)?;
        blueprint.devices.extend(self.graphics());
        for text in &self.device {
            blueprint.devices.push(Bag::parse(text, "driver")?);
        }
        Ok(blueprint)
    }

    /// Refuses what [`Self::blueprint`] would refuse of the arguments' form.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        self.memory()?;
        self.smp()?;
        Ok(())
    }

    fn kernel(&self) -> Option<KernelSpec> {
        let entry = self.entry.as_deref().map(|e| match e {
            "32" => EntryMode::Protected,
            "64" => EntryMode::Long,
            _ => EntryMode::Pvh,
        });
        let kernel = self.kernel.clone()?;
        Some(KernelSpec { kernel, initrd: self.initrd.clone(), append: self.append.clone(), entry })
    }

    fn smp(&self) -> Result<SmpSpec, Failure> {
        let bag = Bag { driver: "--cpus".into(), id: None, props: parse_keyval(&self.cpus, "cpus")? };
        Ok(bag.spec()?)
    }

    fn memory(&self) -> Result<MemorySpec, Failure> {
        let mut bag = Bag { driver: "--memory".into(), id: None, props: parse_keyval(&self.memory, "size")? };
        if let Some(serde_json::Value::String(text)) = bag.props.get("size") {
            let size = memory::parse_size(text, 'M').map_err(Failure::usage)?;
            bag.props.insert("size".into(), size.into());
        }
        Ok(bag.spec()?)
    }
}

/// The typed form of an option's text.
fn spec_of<T: serde::de::DeserializeOwned + schemars::JsonSchema>(
    option: &str,
    text: &str,
    first: &str,
) -> Result<T, Failure> {
    Ok(Bag { driver: option.into(), id: None, props: parse_keyval(text, first)? }.spec()?)
}

fn device_list() -> String {
    let mut out = String::new();
    for model in models() {
        let names: Vec<_> = model.names().into_iter().take(2).collect();
        out += &format!("{:<44} {}\n", names.join(", "), model.about);
    }
    out
}
