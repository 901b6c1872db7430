//! The table of QEMU's options.

use crate::command::{Command, MonitorOption};
use crate::{Error, Result, help};
use base::props::{Bag, parse_keyval};
use machine::control::RebootAction;
use monitor::Mode;

/// Whether an option has a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    Nothing,
    Value,
}

pub(crate) enum Action {
    Do(fn(&mut Command, &str) -> Result<()>),
    /// Known, and not supported; the sentence says why or what to use.
    Unsupported(&'static str),
}

/// A row.
pub(crate) struct Opt {
    pub(crate) name: &'static str,
    pub(crate) takes: Takes,
    pub(crate) about: &'static str,
    pub(crate) action: Action,
}

const fn flag(name: &'static str, about: &'static str, f: fn(&mut Command, &str) -> Result<()>) -> Opt {
    Opt { name, takes: Takes::Nothing, about, action: Action::Do(f) }
}

const fn value(name: &'static str, about: &'static str, f: fn(&mut Command, &str) -> Result<()>) -> Opt {
    Opt { name, takes: Takes::Value, about, action: Action::Do(f) }
}

const fn no_flag(name: &'static str, why: &'static str) -> Opt {
    Opt { name, takes: Takes::Nothing, about: "", action: Action::Unsupported(why) }
}

const fn no_value(name: &'static str, why: &'static str) -> Opt {
    Opt { name, takes: Takes::Value, about: "", action: Action::Unsupported(why) }
}

/// The option of that name.
pub(crate) fn find(name: &str) -> Option<&'static Opt> {
    OPTIONS.iter().find(|o| o.name == name)
}

/// A drive of an old option (`-hda FILE`).
fn old_drive(c: &mut Command, file: &str, props: &[(&str, &str)]) -> Result<()> {
    let mut drive = crate::command::Props::new();
    drive.insert("file".into(), file.into());
    for (key, value) in props {
        drive.insert((*key).into(), (*value).into());
    }
    c.drives.push(drive);
    Ok(())
}

fn bag_or_help(
    c: &mut Command,
    text: &str,
    implied: &str,
    help: fn(Option<&Bag>) -> Result<String>,
) -> Result<Option<Bag>> {
    if text == "help" || text == "?" {
        c.help = Some(help(None)?);
        return Ok(None);
    }
    let bag = Bag::parse(text, implied)?;
    if bag.wants_help() {
        c.help = Some(help(Some(&bag))?);
        return Ok(None);
    }
    Ok(Some(bag))
}

fn mon(c: &mut Command, text: &str) -> Result<()> {
    let mut props = parse_keyval(text, "chardev")?;
    let chardev =
        crate::command::take(&mut props, "chardev").ok_or_else(|| Error::new("chardev= is missing"))?;
    let pretty = crate::command::take_switch(&mut props, "pretty")?.unwrap_or(false);
    let mode = match (crate::command::take(&mut props, "mode").as_deref(), pretty) {
        (None | Some("readline"), false) => Mode::Readline,
        (Some("control"), false) => Mode::Control,
        (Some("control"), true) => Mode::ControlPretty,
        (None | Some("readline"), true) => {
            return Err(Error::new("'pretty' is not compatible with HMP monitors"));
        }
        (Some(other), _) => {
            return Err(Error::new(format!("unknown monitor mode \"{other}\": use readline or control")));
        }
    };
    // The id names nothing.
    props.remove("id");
    crate::command::finish("mon", &props, &["chardev", "mode", "pretty", "id"])?;
    c.monitors.push(MonitorOption::Chardev(chardev, mode));
    Ok(())
}

fn action(c: &mut Command, text: &str) -> Result<()> {
    let props = parse_keyval(text, "")?;
    let mut now = serde_json::to_value(c.actions).map_err(|e| Error::new(e.to_string()))?;
    for (key, value) in props {
        if !["reboot", "shutdown", "panic", "watchdog"].contains(&key.as_str()) {
            return Err(Error::new(format!(
                "Invalid parameter '{key}': use reboot, shutdown, panic or watchdog"
            )));
        }
        now[&key] = value;
        c.actions = serde_json::from_value(now.clone())
            .map_err(|e| Error::new(format!("{key}={}: {e}", crate::command::text(&now[&key]))))?;
    }
    Ok(())
}

fn global(c: &mut Command, text: &str) -> Result<()> {
    let bad = || Error::new("expected DRIVER.PROPERTY=VALUE");
    let (left, value) = text.split_once('=').ok_or_else(bad)?;
    if left == "driver" || text.contains(",property=") {
        let mut props = parse_keyval(text, "")?;
        let mut take = |key: &str| crate::command::take(&mut props, key).ok_or_else(bad);
        let entry = (take("driver")?, take("property")?, take("value")?);
        c.globals.push(entry);
        return Ok(());
    }
    let (driver, property) = left.rsplit_once('.').ok_or_else(bad)?;
    c.globals.push((driver.into(), property.into(), value.into()));
    Ok(())
}

/// All options.
pub(crate) const OPTIONS: &[Opt] = &[
    // Standard options.
    flag("h", "this help", |c, _| help::all(c)),
    flag("help", "this help", |c, _| help::all(c)),
    flag("version", "version information", |c, _| help::version(c)),
    value("machine", "[type=]NAME[,option=value...]: the machine; 'help' lists them", help::machine_option),
    value("M", "as -machine", help::machine_option),
    value("cpu", "MODEL[,feature=on|off...]: the CPU; 'help' lists them", |c, v| {
        if v == "help" || v == "?" {
            c.help = Some(help::cpus());
        }
        c.cpu = Some(v.into());
        Ok(())
    }),
    value("accel", "[accel=]NAME[,option=value...]: the accelerator; 'help' lists them", |c, v| {
        if let Some(bag) = bag_or_help(c, v, "accel", |_| Ok(help::accels()))? {
            c.accels.push(bag);
        }
        Ok(())
    }),
    flag("enable-kvm", "as -accel kvm", |c, _| {
        c.accels.push(Bag::new("kvm"));
        Ok(())
    }),
    value("smp", "[cpus=]N[,sockets=][,dies=][,cores=][,threads=][,maxcpus=]: vCPUs", |c, v| {
        Command::merge(&mut c.smp, v, "cpus")
    }),
    value("m", "[size=]SIZE[,slots=N,maxmem=SIZE]: RAM, MiB without a suffix", |c, v| {
        Command::merge(&mut c.memory, v, "size")
    }),
    value("mem-path", "FILE: RAM in this file or hugetlbfs mount", |c, v| {
        c.mem_path = Some(v.into());
        Ok(())
    }),
    flag("mem-prealloc", "allocate RAM at start", |c, _| {
        c.mem_prealloc = true;
        Ok(())
    }),
    value("overcommit", "[mem-lock=on|off][,cpu-pm=on|off]: use of host resources", |c, v| {
        let mut props = parse_keyval(v, "")?;
        if let Some(lock) = crate::command::take_switch(&mut props, "mem-lock")? {
            c.mem_lock = lock;
        }
        if crate::command::take_switch(&mut props, "cpu-pm")? == Some(true) {
            return Err(Error::new("cpu-pm=on is not supported: idle vCPUs give the processor back"));
        }
        crate::command::finish("overcommit", &props, &["mem-lock", "cpu-pm"])
    }),
    value("object", "KIND,id=ID[,property=value...]: an object; 'help' lists the kinds", |c, v| {
        if let Some(bag) = bag_or_help(c, v, "qom-type", help::objects)? {
            c.objects.push(bag);
        }
        Ok(())
    }),
    value("name", "[guest=]NAME[,process=NAME][,debug-threads=on|off]: name of the guest", |c, v| {
        let mut props = parse_keyval(v, "guest")?;
        c.name = crate::command::take(&mut props, "guest").or(c.name.take());
        // Threads always have names.
        crate::command::take_switch(&mut props, "debug-threads")?;
        if props.contains_key("process") {
            return Err(Error::new("process= is not supported"));
        }
        crate::command::finish("name", &props, &["guest", "process", "debug-threads"])
    }),
    value("uuid", "UUID: the machine's UUID", |c, v| {
        c.uuid = Some(help::uuid(v)?);
        Ok(())
    }),
    value(
        "boot",
        "[order=LETTERS][,once=LETTERS][,menu=on|off][,strict=on|off]...: what firmware boots",
        |c, v| {
            let implied = if v.contains('=') { "" } else { "order" };
            Command::merge(&mut c.boot, v, implied)
        },
    ),
    value("k", "LANGUAGE: keyboard layout of VNC clients that send characters", |c, v| {
        c.keyboard = Some(v.into());
        Ok(())
    }),
    value(
        "rtc",
        "[base=utc|localtime|DATE][,clock=host|rt|vm][,driftfix=none|slew]: the real-time clock",
        |c, v| Command::merge(&mut c.rtc, v, "base"),
    ),
    value("global", "DRIVER.PROPERTY=VALUE: a default for all devices of a kind", global),
    value("set", "GROUP.ID.ARG=VALUE: changes an option given before", |c, v| {
        let bad = || Error::new("expected GROUP.ID.ARG=VALUE");
        let (left, value) = v.split_once('=').ok_or_else(bad)?;
        let parts: Vec<&str> = left.splitn(3, '.').collect();
        let [group, id, arg] = parts.as_slice() else { return Err(bad()) };
        c.sets.push(((*group).into(), (*id).into(), (*arg).into(), value.into()));
        Ok(())
    }),
    value(
        "action",
        "reboot=reset|shutdown,shutdown=poweroff|pause,panic=...,watchdog=...: at the guest's ends",
        action,
    ),
    value("watchdog-action", "reset|shutdown|poweroff|inject-nmi|pause|debug|none", |c, v| {
        action(c, &format!("watchdog={v}"))
    }),
    flag("no-reboot", "exit instead of rebooting", |c, _| {
        c.actions.reboot = RebootAction::Shutdown;
        Ok(())
    }),
    flag("no-shutdown", "stop instead of exiting when the guest powers off", |c, _| {
        c.no_shutdown = true;
        Ok(())
    }),
    value("add-fd", "fd=N,set=N[,opaque=TEXT]", |_, _| {
        Err(Error::new("not supported on the command line; use add-fd on the monitor"))
    }),
    // Disks.
    value("drive", "[file=FILE][,if=TYPE][,media=disk|cdrom][,format=F][,id=ID]...: a disk", |c, v| {
        c.drives.push(parse_keyval(v, "file")?);
        Ok(())
    }),
    value("blockdev", "[driver=]DRIVER,node-name=NAME[,option=value...] or JSON: a block node", |c, v| {
        c.blockdevs.push(Bag::parse(v, "driver")?);
        Ok(())
    }),
    value("hda", "FILE: first hard disk", |c, v| old_drive(c, v, &[("index", "0"), ("media", "disk")])),
    value("hdb", "FILE: second hard disk", |c, v| old_drive(c, v, &[("index", "1"), ("media", "disk")])),
    value("hdc", "FILE: third hard disk", |c, v| old_drive(c, v, &[("index", "2"), ("media", "disk")])),
    value("hdd", "FILE: fourth hard disk", |c, v| old_drive(c, v, &[("index", "3"), ("media", "disk")])),
    value("cdrom", "FILE: CD-ROM", |c, v| old_drive(c, v, &[("index", "2"), ("media", "cdrom")])),
    value("fda", "FILE: first floppy disk", |c, v| old_drive(c, v, &[("if", "floppy"), ("index", "0")])),
    value("fdb", "FILE: second floppy disk", |c, v| old_drive(c, v, &[("if", "floppy"), ("index", "1")])),
    value("pflash", "FILE: firmware in flash", |c, v| old_drive(c, v, &[("if", "pflash")])),
    flag("snapshot", "write to temporary files instead of disk images", |c, _| {
        c.snapshot = true;
        Ok(())
    }),
    no_value("mtdblock", "there is no MTD on a PC"),
    no_value("sd", "there is no SD card reader"),
    no_value("fsdev", "9p file systems are not supported"),
    no_value("virtfs", "9p file systems are not supported"),
    no_value("iscsi", "iSCSI images are not supported"),
    // Devices.
    value(
        "device",
        "DRIVER[,property=value...] or JSON: a device; 'help' lists them, 'DRIVER,help' its properties",
        |c, v| {
            if let Some(bag) = bag_or_help(c, v, "driver", help::devices)? {
                c.devices.push(bag);
            }
            Ok(())
        },
    ),
    flag("usb", "a USB controller", |c, _| {
        c.usb = true;
        Ok(())
    }),
    value("usbdevice", "tablet|mouse|keyboard: a USB device", |c, v| {
        if !["tablet", "mouse", "keyboard"].contains(&v) {
            return Err(Error::new("use tablet, mouse or keyboard"));
        }
        c.usb = true;
        c.usb_devices.push(v.into());
        Ok(())
    }),
    value("audiodev", "[driver=]none,id=ID: audio back end", |_, v| {
        match Bag::parse(v, "driver")?.driver.as_str() {
            "none" => Ok(()),
            other => Err(Error::new(format!("audio back end '{other}' is not supported; use none"))),
        }
    }),
    no_value("audio", "sound is not supported"),
    no_flag("audio-help", "sound is not supported"),
    no_value("soundhw", "sound is not supported"),
    value("netdev", "KIND,id=ID[,option=value...] or JSON: a network back end", |c, v| {
        if let Some(bag) = crate::network::parse(c, v)? {
            if bag.id.is_none() {
                return Err(Error::new("Parameter 'id' is missing"));
            }
            c.netdevs.push(bag);
        }
        Ok(())
    }),
    value(
        "nic",
        "[KIND][,model=MODEL][,mac=MAC][,option=value...]: a network card and its back end",
        |c, v| {
            if v == "none" {
                c.no_nic = true;
                return Ok(());
            }
            if let Some(bag) = crate::network::parse(c, v)? {
                c.nics.push(bag);
            }
            Ok(())
        },
    ),
    value("net", "none|nic|user|tap...: old form of -nic", |c, v| match v {
        "none" => {
            c.no_nic = true;
            Ok(())
        }
        _ => Err(Error::new("the old form is not supported; use -nic or -netdev with -device")),
    }),
    no_value("tpmdev", "there is no TPM yet"),
    no_value("virtioa", "not an option of this version"),
    // Display.
    flag("nographic", "no graphics; serial port and monitor on the terminal", |c, _| {
        c.nographic = true;
        Ok(())
    }),
    value("display", "none|vnc=WHERE: the display", |c, v| {
        let v = v.replacen("vnc=", "vnc,where=", 1);
        c.display = Some(Bag::parse(&v, "type")?);
        Ok(())
    }),
    value("vga", "std|none: the graphics card", |c, v| {
        c.vga = Some(v.into());
        Ok(())
    }),
    value("vnc", "[HOST]:N[,option...]: a VNC server", |c, v| {
        c.vnc.push(v.into());
        Ok(())
    }),
    no_flag("curses", "use -display vnc or -nographic"),
    no_flag("sdl", "there are no windows; use -vnc"),
    no_value("spice", "SPICE is not supported; use -vnc"),
    no_flag("full-screen", "there are no windows; use -vnc"),
    no_value("g", "the resolution is the guest's"),
    no_flag("win2k-hack", "Windows 2000 is not supported"),
    no_value("rotate", "displays are not rotated"),
    // Boot.
    value("kernel", "FILE: Linux or multiboot kernel", |c, v| {
        c.machine.insert("kernel".into(), v.into());
        Ok(())
    }),
    value("initrd", "FILE: initial RAM file system", |c, v| {
        c.initrd = Some(v.into());
        Ok(())
    }),
    value("append", "TEXT: kernel command line", |c, v| {
        c.machine.insert("append".into(), v.into());
        Ok(())
    }),
    no_value("dtb", "PCs have no device tree"),
    value("bios", "FILE: firmware", |c, v| {
        c.bios = Some(v.into());
        Ok(())
    }),
    value("L", "DIRECTORY: where firmware is", |c, v| {
        c.data_dirs.push(v.into());
        Ok(())
    }),
    value("fw_cfg", "[name=]NAME,file=FILE|string=TEXT: a file for firmware and guest", |c, v| {
        c.fw_cfg.push(parse_keyval(v, "name")?);
        Ok(())
    }),
    value("smbios", "file=FILE or type=N[,field=value...]: SMBIOS tables", |c, v| {
        c.smbios.push(parse_keyval(v, "")?);
        Ok(())
    }),
    value("acpitable", "[sig=][,file=FILE]...: an ACPI table", |c, v| {
        c.acpi_tables.push(parse_keyval(v, "")?);
        Ok(())
    }),
    flag("no-acpi", "no ACPI tables", |c, _| {
        c.machine.insert("acpi".into(), "off".into());
        Ok(())
    }),
    flag("no-hpet", "no HPET", |c, _| {
        c.machine.insert("hpet".into(), "off".into());
        Ok(())
    }),
    no_value("option-rom", "give the card's romfile= property instead"),
    no_flag("no-fd-bootchk", "use -boot"),
    // Character devices and monitors.
    value("chardev", "KIND,id=ID[,option=value...]: a character device; 'help' lists the kinds", |c, v| {
        if let Some(bag) = bag_or_help(c, v, "backend", help::chardevs)? {
            c.chardevs.push(bag);
        }
        Ok(())
    }),
    value(
        "serial",
        "WHERE: a serial port: stdio, pty, file:PATH, unix:PATH, tcp:HOST:PORT, chardev:ID, none, null",
        |c, v| {
            c.serials.push(v.into());
            Ok(())
        },
    ),
    value("parallel", "none: a parallel port", |c, v| {
        c.parallels.push(v.into());
        Ok(())
    }),
    value("monitor", "WHERE: the human monitor, or none", |c, v| {
        c.monitors.push(MonitorOption::Device(v.into(), Mode::Readline));
        Ok(())
    }),
    value("qmp", "WHERE: a QMP monitor", |c, v| {
        c.monitors.push(MonitorOption::Device(v.into(), Mode::Control));
        Ok(())
    }),
    value("qmp-pretty", "WHERE: a QMP monitor with indented output", |c, v| {
        c.monitors.push(MonitorOption::Device(v.into(), Mode::ControlPretty));
        Ok(())
    }),
    value("mon", "[chardev=]ID[,mode=readline|control][,pretty=on]: a monitor", mon),
    value("debugcon", "WHERE: the debug port 0xe9", |c, v| {
        let id = format!("debugcon{}", c.devices.len());
        let mut bag = chardev::shorthand(v)?;
        bag.id = Some(id.clone());
        c.chardevs.push(bag);
        c.devices.push(Bag::new("isa-debugcon").with("chardev", id).with("iobase", 0xe9));
        Ok(())
    }),
    // Debugging.
    flag("S", "do not start the vCPUs: the monitor's 'cont' does", |c, _| {
        c.paused = true;
        Ok(())
    }),
    flag("s", "as -gdb tcp::1234", |c, _| {
        c.gdb = Some("tcp::1234".into());
        Ok(())
    }),
    value("gdb", "WHERE: wait for a debugger's connection", |c, v| {
        c.gdb = Some(v.into());
        Ok(())
    }),
    value("d", "ITEM,...: what to log; 'help' lists them", help::log_items),
    value("D", "FILE: where to log", |c, v| {
        c.log_file = Some(v.into());
        Ok(())
    }),
    no_value("dfilter", "logs are not filtered by address"),
    no_value("trace", "use KVASIR_LOG in the environment"),
    no_value("plugin", "there are no plugins"),
    no_flag("singlestep", "use the debugger"),
    no_flag("one-insn-per-tb", "use the debugger"),
    no_value("icount", "instructions are not counted"),
    no_value("seed", "random numbers are the host's"),
    no_value("record", "there is no record and replay"),
    value("msg", "[timestamp=on|off][,guest-name=on|off]: form of messages", |c, v| {
        let mut props = parse_keyval(v, "timestamp")?;
        c.timestamps = crate::command::take_switch(&mut props, "timestamp")?.unwrap_or(c.timestamps);
        if crate::command::take_switch(&mut props, "guest-name")? == Some(true) {
            return Err(Error::new("guest-name=on is not supported"));
        }
        crate::command::finish("msg", &props, &["timestamp", "guest-name"])
    }),
    // The process.
    flag("daemonize", "go to the background once ready", |c, _| {
        c.daemonize = true;
        Ok(())
    }),
    value("pidfile", "FILE: write the process id there", |c, v| {
        c.pidfile = Some(v.into());
        Ok(())
    }),
    value("readconfig", "FILE: more options from a file", |c, v| c.read_config(v)),
    flag("nodefaults", "no default devices", |c, _| {
        c.no_defaults = true;
        Ok(())
    }),
    // There are no configuration files of users or distributions.
    flag("no-user-config", "no user configuration", |_, _| Ok(())),
    flag("nodefconfig", "no user configuration", |_, _| Ok(())),
    value("sandbox", "on|off[,...]: seccomp filter", |c, v| {
        let mut props = parse_keyval(v, "enable")?;
        c.sandbox = crate::command::take_switch(&mut props, "enable")?.unwrap_or(true);
        if c.sandbox {
            return Err(Error::new("the seccomp filter is not there yet; use -sandbox off"));
        }
        Ok(())
    }),
    no_value("run-with", "use -daemonize, and the service manager for the rest"),
    no_value("runas", "start the program as that user"),
    no_value("chroot", "use the service manager or unshare"),
    no_value("incoming", "migration is not there yet"),
    no_value("loadvm", "snapshots of whole machines are not there yet"),
    no_flag("only-migratable", "migration is not there yet"),
    no_flag("preconfig", "use -S"),
    no_value("numa", "NUMA nodes are not there yet"),
    no_flag("semihosting", "that is for ARM"),
    no_value("semihosting-config", "that is for ARM"),
    no_flag("old-param", "that is for ARM"),
    no_value("prom-env", "that is for PowerPC and SPARC"),
    no_flag("xen-attach", "there is no Xen"),
    no_value("xen-domid", "there is no Xen"),
    no_flag("xen-domid-restrict", "there is no Xen"),
    no_flag("enable-fips", "it was removed from QEMU, too"),
    no_flag("enable-sync-profile", "use perf"),
    no_flag("perfmap", "use perf"),
    no_flag("jitdump", "use perf"),
    no_value("tb-size", "use -accel tcg,tb-size="),
    no_value("compat", "there is one interface"),
    no_flag("clock", "the host's monotonic clock is used"),
    no_value("balloon", "use -device virtio-balloon"),
    no_value("watchdog", "use -device"),
    no_value("bt", "Bluetooth is not supported"),
    no_value("echr", "the escape character is Ctrl-A"),
    no_flag("show-cursor", "there are no windows"),
    no_flag("portrait", "displays are not rotated"),
    no_flag("no-kvm", "use -accel tcg"),
    no_value("virtiocon", "use -device virtio-serial-pci with virtconsole"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn options_are_unique_and_described() {
        let mut seen = HashSet::new();
        for o in OPTIONS {
            assert!(seen.insert(o.name), "-{} twice", o.name);
            match o.action {
                Action::Do(_) => assert!(!o.about.is_empty(), "-{}", o.name),
                Action::Unsupported(why) => assert!(!why.is_empty(), "-{}", o.name),
            }
        }
    }
}
