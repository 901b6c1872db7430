//! From what the options say to the blueprint.

use crate::command::{Command, MonitorOption, finish, take, take_switch, text};
use crate::drives::{self, Numbers};
use crate::{Error, Result};
use base::props::{Bag, parse_keyval};
use machine::blueprint::{Blueprint, MemorySpec};
use machine::control::{ErrorAction, ShutdownAction};
use machine::kernel::KernelSpec;
use machine::objects::MemoryBackend;
use machine::topology::SmpSpec;
use monitor::Mode;
use std::path::PathBuf;

/// Everything that a run needs.
#[derive(Debug, Default)]
pub struct Plan {
    /// A help text that was asked for instead.
    pub help: Option<String>,
    /// The machine.
    pub blueprint: Blueprint,
    /// Accelerators to try, in order.
    pub accels: Vec<Bag>,
    /// Block nodes as they were described.
    pub graph: machine::graph::Graph,
    /// Character devices to open, by id.
    pub chardevs: Vec<Bag>,
    /// Monitors: the character device's id, and how it talks.
    pub monitors: Vec<(String, Mode)>,
    /// Name given to the guest.
    pub name: Option<String>,
    /// UUID, or zeroes.
    pub uuid: String,
    /// Go to the background.
    pub daemonize: bool,
    /// Where to write the process id.
    pub pidfile: Option<PathBuf>,
    /// Where to log.
    pub log_file: Option<PathBuf>,
    /// What to log.
    pub log_items: Vec<String>,
    /// Times in messages.
    pub timestamps: bool,
    /// Lock all memory.
    pub mem_lock: bool,
    /// Keep guest memory out of core dumps.
    pub no_core: bool,
    /// What shows the screens, as `--display` takes it.
    pub display: String,
    /// Say where the display is: nobody asked for it.
    pub announce_display: bool,
    /// Layout of the keyboards of viewers that send characters.
    pub keyboard: Option<String>,
    flash: [Option<String>; 2],
    /// Where a debugger may connect.
    pub gdb: Option<String>,
    /// Remarks for the user that are no errors.
    pub warnings: Vec<String>,
}

/// Translates.
pub(crate) fn plan(mut c: Command) -> Result<Plan> {
    let mut plan = Plan { help: c.help.take(), ..Plan::default() };
    if plan.help.is_some() {
        return Ok(plan);
    }
    sets(&mut c)?;
    plan.name.clone_from(&c.name);
    plan.uuid = c.uuid.clone().unwrap_or_else(|| "00000000-0000-0000-0000-000000000000".into());
    plan.daemonize = c.daemonize;
    plan.pidfile = c.pidfile.take();
    plan.log_file = c.log_file.take();
    plan.log_items = std::mem::take(&mut c.log_items);
    plan.timestamps = c.timestamps;
    plan.mem_lock = c.mem_lock;
    plan.gdb = c.gdb.take();
    plan.blueprint.name = c.name.clone().unwrap_or_else(|| "QEMU".into());
    plan.blueprint.paused = c.paused;
    plan.blueprint.actions = c.actions;
    plan.blueprint.actions.error = ErrorAction::Pause;
    if c.no_shutdown {
        plan.blueprint.actions.shutdown = ShutdownAction::Pause;
    }
    let backend = machine(&mut plan, &mut c)?;
    for bag in std::mem::take(&mut c.objects) {
        machine::objects::check(&bag)?;
        plan.blueprint.objects.push(bag);
    }
    memory(&mut plan, &mut c, backend)?;
    smp(&mut plan, &mut c)?;
    firmware(&mut plan, &mut c)?;
    cpu(&mut plan, &c)?;
    rtc(&mut c)?;
    unsupported_yet(&c)?;
    for bag in &c.blockdevs {
        plan.graph.add(bag).map_err(|e| Error::new(format!("-blockdev: {e}")))?;
    }
    let images = plan.graph.images().map_err(|e| Error::new(format!("-blockdev {e}")))?;
    plan.blueprint.blockdevs.extend(images);
    let nodes = std::mem::take(&mut plan.flash);
    flash(&mut plan, nodes)?;
    let mut numbers = Numbers::default();
    for drive in std::mem::take(&mut c.drives) {
        drives::drive(&mut plan, &mut numbers, drive, c.snapshot)?;
    }
    consoles(&mut plan, &mut c)?;
    graphics(&mut plan, &mut c)?;
    display(&mut plan, &mut c)?;
    usb(&mut plan, &mut c);
    crate::network::add(&mut plan, &mut c)?;
    plan.blueprint.devices.append(&mut c.devices);
    globals(&mut plan, &c)?;
    Ok(plan)
}

/// `-set group.id.arg=value`.
fn sets(c: &mut Command) -> Result<()> {
    for (group, id, arg, value) in std::mem::take(&mut c.sets) {
        let lists: &mut Vec<Bag> = match group.as_str() {
            "device" => &mut c.devices,
            "netdev" => &mut c.netdevs,
            "chardev" => &mut c.chardevs,
            "object" => &mut c.objects,
            _ => {
                return Err(Error::new(format!(
                    "-set: there is no group '{group}': use device, netdev, chardev or object"
                )));
            }
        };
        let bag = lists.iter_mut().find(|b| b.id.as_deref() == Some(&id));
        let bag = bag.ok_or_else(|| Error::new(format!("-set: there is no {group} \"{id}\" defined")))?;
        bag.props.insert(arg, value.into());
    }
    Ok(())
}

/// The board that a machine type of QEMU stands for.
fn board(name: &str) -> &str {
    if name.starts_with("pc-q35-") {
        "q35"
    } else if name.starts_with("pc-i440fx-") {
        "pc"
    } else {
        name
    }
}

/// Machine, accelerator, kernel. Returns the id of the memory backend, if one is named.
fn machine(plan: &mut Plan, c: &mut Command) -> Result<Option<String>> {
    let known: Vec<&str> = machine::BOARDS.iter().map(|b| b.name).collect();
    let default = if known.contains(&"pc") { "pc" } else { "q35" };
    let p = &mut c.machine;
    let kind = take(p, "type").unwrap_or_else(|| default.into());
    let name = board(&kind);
    if !known.contains(&name) {
        let near = base::nearest(&kind, known.iter().copied());
        let near = near.map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
        return Err(Error::new(format!(
            "-machine {kind}: unsupported machine type{near}\nUse -machine help to list supported machines"
        )));
    }
    plan.blueprint.machine = Bag::new(name);
    for name in take(p, "accel").unwrap_or_default().split(':').filter(|n| !n.is_empty()) {
        c.accels.push(Bag::new(name));
    }
    plan.accels = std::mem::take(&mut c.accels);
    for bag in &mut plan.accels {
        // Threads: one for each vCPU, always.
        match bag.props.remove("thread").map(|v| text(&v)).as_deref() {
            None | Some("multi") => {}
            Some(other) => {
                return Err(Error::new(format!("-accel thread={other} is not supported: use multi")));
            }
        }
        if let Some(size) = bag.props.remove("tb-size") {
            bag.props.insert("cache".into(), format!("{}M", text(&size)).into());
        }
    }
    if plan.accels.is_empty() {
        plan.accels.push(Bag::new("auto"));
    }
    let kernel = take(p, "kernel");
    let append = take(p, "append");
    let initrd = c.initrd.take().or_else(|| take(p, "initrd").map(PathBuf::from));
    match kernel {
        Some(kernel) => {
            let append = append.unwrap_or_default();
            plan.blueprint.kernel = Some(KernelSpec { kernel: kernel.into(), initrd, append, entry: None });
        }
        None if append.is_some() => return Err(Error::new("-append only allowed with -kernel option")),
        None if initrd.is_some() => return Err(Error::new("-initrd only allowed with -kernel option")),
        None => {}
    }
    if let Some(path) = take(p, "firmware") {
        c.bios = Some(path.into());
    }
    c.usb |= take_switch(p, "usb")?.unwrap_or(false);
    if take_switch(p, "dump-guest-core")? == Some(false) {
        plan.no_core = true;
    }
    if take_switch(p, "mem-merge")? == Some(true) {
        return Err(Error::new("-machine mem-merge=on is not supported: pages are not merged"));
    }
    if take_switch(p, "vmport")? == Some(true) {
        return Err(Error::new("-machine vmport=on is not supported: there is no VMware port"));
    }
    match take(p, "vmport").as_deref() {
        None | Some("auto") => {}
        Some(other) => return Err(Error::new(format!("-machine vmport={other}: use off"))),
    }
    match take(p, "kernel_irqchip").or_else(|| take(p, "kernel-irqchip")).as_deref() {
        // As the accelerator has it: in the kernel with KVM.
        None | Some("on") => {}
        Some(other) => {
            return Err(Error::new(format!("-machine kernel_irqchip={other} is not supported: use on")));
        }
    }
    if take_switch(p, "nvdimm")? == Some(true) {
        return Err(Error::new("-machine nvdimm=on is not supported"));
    }
    if take_switch(p, "suppress-vmdesc")? == Some(true) {
        return Err(Error::new("-machine suppress-vmdesc=on: migration is not there yet"));
    }
    let backend = take(p, "memory-backend");
    plan.flash = [take(p, "pflash0"), take(p, "pflash1")];
    // What is left is the board's, and it says what it does not know.
    for (key, value) in std::mem::take(p) {
        plan.blueprint.machine.props.insert(key, value);
    }
    plan.blueprint
        .machine
        .spec::<machine::blueprint::BoardSpec>()
        .map_err(|e| Error::new(format!("-machine {e}")))?;
    Ok(backend)
}

/// A size in MiB without a suffix.
fn megabytes(text: &str) -> Result<u64> {
    memory::parse_size(text, 'M').map_err(|e| Error::new(e.to_string()))
}

fn memory(plan: &mut Plan, c: &mut Command, backend: Option<String>) -> Result<()> {
    let at = |e: Error| Error::new(format!("-m: {e}"));
    let p = &mut c.memory;
    let size = match take(p, "size") {
        Some(text) => Some(megabytes(&text).map_err(at)?),
        None => None,
    };
    let mut spec = MemorySpec { size: size.unwrap_or(128 << 20), ..MemorySpec::default() };
    if let Some(max) = take(p, "maxmem")
        && megabytes(&max).map_err(at)? != spec.size
    {
        return Err(at(Error::new(
            "maxmem= other than the size is not supported: memory cannot be plugged in",
        )));
    }
    if take(p, "slots").is_some_and(|s| s != "0") {
        return Err(at(Error::new("slots= is not supported: memory cannot be plugged in")));
    }
    finish("-m", p, &["size", "slots", "maxmem"])?;
    if let Some(path) = c.mem_path.take() {
        spec.path = Some(path);
    }
    spec.prealloc = c.mem_prealloc;
    if let Some(id) = backend {
        let bag = plan.blueprint.objects.iter().find(|o| o.id.as_deref() == Some(&id));
        let bag =
            bag.ok_or_else(|| Error::new(format!("-machine memory-backend={id}: there is no such object")))?;
        let object: MemoryBackend = bag.spec()?;
        if size.is_some_and(|s| s != object.size) {
            return Err(Error::new(format!("Size specified by -m option must match size of backend '{id}'")));
        }
        spec.size = object.size;
        spec.prealloc |= object.prealloc;
        spec.hugepages = object.hugetlb;
        spec.hugepagesize = object.hugetlbsize;
        spec.share = object.share.unwrap_or(bag.driver == "memory-backend-memfd");
        spec.path = object.mem_path;
        if object.merge == Some(true) {
            return Err(Error::new(format!(
                "object '{id}': merge=on is not supported: pages are not merged"
            )));
        }
        plan.no_core |= object.dump == Some(false);
    }
    plan.blueprint.memory = spec;
    Ok(())
}

fn smp(plan: &mut Plan, c: &mut Command) -> Result<()> {
    let p = &mut c.smp;
    let mut number = |key: &str| match take(p, key) {
        None => Ok(None),
        Some(t) => match t.parse::<u32>() {
            Ok(0) => Err(Error::new(format!("-smp: {key} must be greater than zero"))),
            Ok(n) => Ok(Some(n)),
            Err(_) => Err(Error::new(format!("-smp: Parameter '{key}' expects a number"))),
        },
    };
    let max = number("maxcpus")?;
    if number("clusters")?.is_some_and(|n| n > 1) {
        return Err(Error::new("-smp: clusters not supported by this machine's CPU topology"));
    }
    let spec = SmpSpec {
        cpus: number("cpus")?,
        sockets: number("sockets")?,
        dies: number("dies")?,
        cores: number("cores")?,
        threads: number("threads")?,
    };
    finish("-smp", p, &["cpus", "sockets", "dies", "cores", "threads", "maxcpus"])?;
    if let (Some(max), Some(cpus)) = (max, spec.cpus)
        && max != cpus
    {
        return Err(Error::new(format!(
            "-smp: maxcpus={max} is not supported: vCPUs cannot be plugged in, so it must be {cpus}"
        )));
    }
    plan.blueprint.smp = SmpSpec { cpus: spec.cpus.or(max), ..spec };
    Ok(())
}

fn rtc(c: &mut Command) -> Result<()> {
    let p = &mut c.rtc;
    match take(p, "base").as_deref() {
        None | Some("utc") => {}
        Some(other) => return Err(Error::new(format!("-rtc base={other} is not supported yet: use utc"))),
    }
    match take(p, "clock").as_deref() {
        None | Some("host") => {}
        Some(other) => return Err(Error::new(format!("-rtc clock={other} is not supported: use host"))),
    }
    match take(p, "driftfix").as_deref() {
        None | Some("none" | "slew") => {}
        Some(other) => return Err(Error::new(format!("-rtc driftfix={other}: use none or slew"))),
    }
    finish("-rtc", p, &["base", "clock", "driftfix"])
}

/// `-bios`, `-L`, `-boot`, `-fw_cfg`.
fn firmware(plan: &mut Plan, c: &mut Command) -> Result<()> {
    if let Some(path) = c.bios.take() {
        // A bare name is looked for where -L says.
        let found = c.data_dirs.iter().map(|d| d.join(&path)).find(|p| p.exists());
        let path = if path.exists() { path } else { found.unwrap_or(path) };
        plan.blueprint.firmware.kind = path.display().to_string();
    } else if c.nographic && plan.blueprint.machine.driver == "none" {
        plan.blueprint.firmware.kind = "none".into();
    }
    if !c.boot.is_empty() {
        let bag = Bag { driver: "-boot".into(), id: None, props: std::mem::take(&mut c.boot) };
        plan.blueprint.boot = bag.spec()?;
    }
    for props in std::mem::take(&mut c.fw_cfg) {
        let bag = Bag { driver: "-fw_cfg".into(), id: None, props };
        plan.blueprint.fw_cfg.push(bag.spec()?);
    }
    Ok(())
}

/// Flash given as nodes (`-machine pflash0=NODE,pflash1=NODE`): firmware and its variables.
fn flash(plan: &mut Plan, nodes: [Option<String>; 2]) -> Result<()> {
    for (i, node) in nodes.into_iter().enumerate() {
        let Some(node) = node else { continue };
        let at = plan.blueprint.blockdevs.iter().position(|b| b.id.as_deref() == Some(&node));
        let at = at.ok_or_else(|| Error::new(format!("-machine pflash{i}={node}: there is no such node")))?;
        let bag = plan.blueprint.blockdevs.remove(at);
        let file = bag.props.get("file").map(text).unwrap_or_default();
        if i == 0 {
            plan.blueprint.firmware.kind = file;
        } else {
            plan.blueprint.firmware.vars = Some(file.into());
        }
    }
    Ok(())
}

/// `-cpu`: as QEMU does, what the accelerator lacks is left out with a warning unless `enforce` is given.
fn cpu(plan: &mut Plan, c: &Command) -> Result<()> {
    let Some(text) = &c.cpu else { return Ok(()) };
    let mut bag = machine::cpu::parse(text)?;
    machine::cpu::Request::new(&bag)?;
    bag.props.entry("enforce").or_insert("off".into());
    plan.blueprint.cpu = bag;
    Ok(())
}

/// The graphics card.
fn graphics(plan: &mut Plan, c: &mut Command) -> Result<()> {
    let has_card = c.devices.iter().any(|d| d.driver == "VGA");
    let board = plan.blueprint.machine.driver.as_str();
    let default = if c.no_defaults || has_card || !["q35", "pc"].contains(&board) { "none" } else { "std" };
    match c.vga.take().as_deref().unwrap_or(default) {
        "none" => {}
        "std" => plan.blueprint.devices.push(Bag::new("VGA")),
        other => return Err(Error::new(format!("-vga {other}: not supported: use std or none"))),
    }
    Ok(())
}

/// What shows the screens: `-vnc`, `-display`, or by default a VNC server for this host, as QEMU has where there are no
/// windows.
fn display(plan: &mut Plan, c: &mut Command) -> Result<()> {
    plan.keyboard = c.keyboard.take();
    let shown = c.display.take();
    if c.vnc.len() > 1 {
        return Err(Error::new("-vnc: one server is supported"));
    }
    let (mut props, own) = match (c.vnc.pop(), shown) {
        (Some(text), _) if text == "none" => (None, false),
        (Some(text), _) => (Some(parse_keyval(&text, "display")?), true),
        (None, Some(bag)) => match bag.driver.as_str() {
            "none" => (None, false),
            "vnc" => {
                let mut p = bag.props;
                if let Some(at) = p.remove("where") {
                    p.insert("display".into(), at);
                }
                (Some(p), true)
            }
            other => {
                return Err(Error::new(format!("-display {other}: not supported: use vnc=WHERE or none")));
            }
        },
        (None, None) if c.nographic || plan.blueprint.machine.driver == "none" => (None, false),
        (None, None) => (Some(parse_keyval("127.0.0.1:0,to=99", "display")?), false),
    };
    plan.announce_display = !own;
    let Some(props) = &mut props else {
        plan.display = "none".into();
        return Ok(());
    };
    // Sound goes nowhere, whatever the back end's name.
    props.remove("audiodev");
    props.remove("id");
    if take_switch(props, "power-control")? == Some(true) {
        return Err(Error::new("-vnc: power-control=on is not supported"));
    }
    let parts: Vec<String> =
        props.iter().map(|(k, v)| format!("{k}={}", text(v).replace(',', ",,"))).collect();
    plan.display = format!("vnc={}", parts.join(","));
    Ok(())
}

/// `-usb` and `-usbdevice`.
fn usb(plan: &mut Plan, c: &mut Command) {
    let has_controller = c.devices.iter().any(|d| d.driver.ends_with("-xhci"));
    if c.usb && !has_controller {
        plan.blueprint.devices.push(Bag::new("qemu-xhci"));
    }
    for kind in c.usb_devices.drain(..) {
        let driver = if kind == "keyboard" { "usb-kbd".into() } else { format!("usb-{kind}") };
        plan.blueprint.devices.push(Bag::new(driver));
    }
}

/// Options whose parts of the machine are not there yet.
fn unsupported_yet(c: &Command) -> Result<()> {
    let no = |what: &str, why: &str| Err(Error::new(format!("{what}: not supported: {why}")));
    if let Some(p) = c.parallels.iter().find(|p| *p != "none") {
        return no(&format!("-parallel {p}"), "there is no parallel port; use -parallel none");
    }
    if !c.smbios.is_empty() {
        return no("-smbios", "not there yet");
    }
    if !c.acpi_tables.is_empty() {
        return no("-acpitable", "not there yet");
    }
    Ok(())
}

/// Serial ports, monitors, and the multiplexer that `-nographic` makes of the terminal.
fn consoles(plan: &mut Plan, c: &mut Command) -> Result<()> {
    plan.chardevs = std::mem::take(&mut c.chardevs);
    let mut serials = std::mem::take(&mut c.serials);
    let mut monitors = std::mem::take(&mut c.monitors);
    let human = monitors.iter().any(|m| {
        matches!(m, MonitorOption::Device(_, Mode::Readline) | MonitorOption::Chardev(_, Mode::Readline))
    });
    let has_serial = !serials.is_empty() || c.devices.iter().any(|d| d.driver == "isa-serial");
    if !c.no_defaults && plan.blueprint.machine.driver != "none" {
        let mut on_terminal = false;
        if c.nographic {
            let taken = serials.iter().any(|s| s == "stdio" || s == "mon:stdio")
                || monitors.iter().any(|m| matches!(m, MonitorOption::Device(w, _) if w == "stdio"))
                || plan.chardevs.iter().any(|b| b.driver == "stdio");
            if !taken {
                on_terminal = true;
            }
        }
        match (on_terminal, has_serial, human) {
            (true, false, false) => serials.push("mon:stdio".into()),
            (true, false, true) => serials.push("stdio".into()),
            (true, true, false) => monitors.push(MonitorOption::Device("stdio".into(), Mode::Readline)),
            // There are no virtual consoles, where QEMU would put them.
            (false, false, _) => serials.push("null".into()),
            _ => {}
        }
    }
    for (i, text) in serials.into_iter().enumerate() {
        if text == "none" {
            continue;
        }
        if let Some(id) = text.strip_prefix("chardev:") {
            plan.blueprint.serials.push(id.into());
            continue;
        }
        let id = format!("serial{i}");
        let mut bag = chardev::shorthand(&text).map_err(|e| Error::new(format!("-serial {text}: {e}")))?;
        bag.id = Some(id.clone());
        if text.starts_with("mon:") {
            plan.monitors.push((id.clone(), Mode::Readline));
        }
        plan.chardevs.push(bag);
        plan.blueprint.serials.push(id);
    }
    let mut n = 0;
    for m in monitors {
        match m {
            MonitorOption::Chardev(id, mode) => plan.monitors.push((id, mode)),
            MonitorOption::Device(text, _) if text == "none" => {}
            MonitorOption::Device(text, mode) => {
                if let Some(id) = text.strip_prefix("chardev:") {
                    plan.monitors.push((id.into(), mode));
                    continue;
                }
                let id = format!("compat_monitor{n}");
                n += 1;
                let mut bag =
                    chardev::shorthand(&text).map_err(|e| Error::new(format!("monitor {text}: {e}")))?;
                bag.id = Some(id.clone());
                // A monitor on the terminal shares it with its escape keys.
                if bag.driver == "stdio" && mode == Mode::Readline {
                    bag = bag.with("mux", true);
                }
                plan.chardevs.push(bag);
                plan.monitors.push((id, mode));
            }
        }
    }
    for bag in &plan.chardevs {
        let id = bag
            .id
            .as_deref()
            .ok_or_else(|| Error::new(format!("-chardev {}: parameter 'id' is missing", bag.driver)))?;
        if plan.chardevs.iter().filter(|b| b.id.as_deref() == Some(id)).count() > 1 {
            return Err(Error::new(format!("Duplicate ID '{id}' for chardev")));
        }
    }
    for (id, _) in &plan.monitors {
        known_chardev(plan, id, "monitor")?;
    }
    for id in &plan.blueprint.serials {
        known_chardev(plan, id, "-serial")?;
    }
    Ok(())
}

fn known_chardev(plan: &Plan, id: &str, what: &str) -> Result<()> {
    let ids = plan.chardevs.iter().filter_map(|b| b.id.as_deref());
    if ids.clone().any(|i| i == id) {
        return Ok(());
    }
    let near = base::nearest(id, ids).map(|n| format!("; did you mean '{n}'?")).unwrap_or_default();
    Err(Error::new(format!("{what}: chardev \"{id}\" not found{near}")))
}

/// `-global`: defaults of devices by model.
fn globals(plan: &mut Plan, c: &Command) -> Result<()> {
    for (driver, property, value) in &c.globals {
        let mut used = false;
        for bag in plan.blueprint.devices.iter_mut().filter(|b| b.driver == *driver) {
            bag.props.entry(property.clone()).or_insert_with(|| value.clone().into());
            used = true;
        }
        if !used {
            plan.warnings
                .push(format!("global {driver}.{property}={value} not used: there is no such device"));
        }
    }
    Ok(())
}
