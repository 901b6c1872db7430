//! Runs a plan: opens character devices, builds the machine, serves its monitors, and ends as QEMU does.

use crate::command::Command;
use crate::daemon::{self, PidFile};
use crate::translate::{self, Plan};
use crate::{Error, Result};
use bus::Chardev;
use chardev::{Escape, Mux};
use display::FrontEnd;
use display::input::Keymap;
use machine::{Acceleration, Cause, Chardevs, Machine, Outcome, Remote};
use monitor::{CharEntry, Context, Settings};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A character device that was opened.
struct Opened {
    chardev: Arc<dyn Chardev>,
    mux: Option<Arc<Mux>>,
}

pub(crate) fn main(program: &str, args: &[String]) -> Result<u8> {
    let plan = translate::plan(Command::read(args)?)?;
    if let Some(help) = &plan.help {
        print!("{help}");
        return Ok(0);
    }
    for warning in &plan.warnings {
        eprintln!("{program}: warning: {warning}");
    }
    let daemon = if plan.daemonize { Some(daemon::fork()?) } else { None };
    init_logs(&plan)?;
    prepare_process(&plan)?;
    let pidfile = plan.pidfile.as_deref().map(PidFile::create).transpose()?;
    let opened = open_chardevs(&plan)?;
    let acceleration = accelerate(program, &plan)?;
    let mut blueprint = plan.blueprint.clone();
    let mut chardevs = Chardevs::new();
    for (id, o) in &opened {
        if !plan.monitors.iter().any(|(m, _)| m == id) || o.mux.is_some() {
            chardevs.insert(id.clone(), o.chardev.clone());
        }
    }
    blueprint.accel = plan.accels.first().cloned().unwrap_or_else(|| base::props::Bag::new("auto"));
    let mut machine = Machine::new(blueprint, &acceleration, chardevs)?;
    let remote = machine.remote();
    let display = show(&plan, &machine)?;
    let context = start_monitors(&plan, &opened, &remote, &acceleration)?;
    *context.vnc.lock().unwrap_or_else(|e| e.into_inner()) = display;
    if let Some(text) = &plan.gdb {
        serve_debugger(text, &remote)?;
    }
    watch_signals(remote.clone())?;
    for o in opened.values() {
        let remote = remote.clone();
        if let Some(mux) = &o.mux {
            mux.on_escape(move |escape| match escape {
                Escape::Quit => remote.quit_because(Cause::HostUi),
                Escape::PowerButton => remote.power_button(),
                Escape::Reset => remote.reset(),
                _ => {}
            });
        }
    }
    if let Some(daemon) = daemon {
        daemon.ready()?;
    }
    let outcome = machine.run();
    context.flush();
    drop(machine);
    drop(context);
    drop(pidfile);
    chardev::restore_terminal();
    chardev::remove_sockets();
    Ok(match outcome? {
        Outcome::PoweredOff | Outcome::Reset | Outcome::Quit => 0,
        Outcome::Exited(status) => status,
        Outcome::Panicked => {
            u8::from(plan.blueprint.actions.panic == machine::control::PanicAction::ExitFailure)
        }
        Outcome::Broken(text) => return Err(Error::new(text)),
    })
}

fn init_logs(plan: &Plan) -> Result<()> {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::fmt::time::SystemTime;
    use tracing_subscriber::prelude::*;
    let mut filter = match std::env::var("KVASIR_LOG") {
        Ok(text) => text.parse::<Targets>().map_err(|e| Error::new(format!("KVASIR_LOG={text}: {e}")))?,
        Err(_) => Targets::new().with_default(LevelFilter::WARN),
    };
    for item in &plan.log_items {
        let more: Targets = item.parse().map_err(|e| Error::new(format!("-d: {e}")))?;
        filter = filter.with_targets(more.iter().map(|(target, level)| (target.to_owned(), level)));
    }
    let layer = tracing_subscriber::fmt::layer().with_ansi(false);
    let registry = tracing_subscriber::registry();
    match &plan.log_file {
        Some(path) => {
            let file =
                std::fs::File::create(path).map_err(|e| Error::new(format!("-D {}: {e}", path.display())))?;
            let file = Arc::new(file);
            let layer = layer.with_writer(file);
            if plan.timestamps {
                registry.with(layer.with_timer(SystemTime).with_filter(filter)).init();
            } else {
                registry.with(layer.without_time().with_filter(filter)).init();
            }
        }
        None => {
            let layer = layer.with_writer(std::io::stderr);
            if plan.timestamps {
                registry.with(layer.with_timer(SystemTime).with_filter(filter)).init();
            } else {
                registry.with(layer.without_time().with_filter(filter)).init();
            }
        }
    }
    Ok(())
}

fn prepare_process(plan: &Plan) -> Result<()> {
    if plan.no_core {
        // Guest memory is most of what a core dump would hold.
        let limit = getrlimit(Resource::Core);
        let none = Rlimit { current: Some(0), maximum: limit.maximum };
        setrlimit(Resource::Core, none).map_err(|e| Error::new(format!("dump-guest-core=off: {e}")))?;
    }
    if plan.mem_lock {
        use rustix::mm::{MlockAllFlags, mlockall};
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)
            .map_err(|e| Error::new(format!("-overcommit mem-lock=on: locking memory failed: {e}")))?;
    }
    Ok(())
}

fn open_chardevs(plan: &Plan) -> Result<BTreeMap<String, Opened>> {
    let mut all = BTreeMap::new();
    for bag in &plan.chardevs {
        let id = bag.id.clone().unwrap_or_default();
        let made =
            chardev::open(bag).map_err(|e| Error::new(format!("-chardev {},id={id}: {e}", bag.driver)))?;
        if let Some(name) = made.chardev.filename().strip_prefix("pty:") {
            // QEMU's words, which scripts look for.
            eprintln!("char device redirected to {name} (label {id})");
        }
        all.insert(id, Opened { chardev: made.chardev, mux: made.mux });
    }
    Ok(all)
}

/// Begins to show the screens.
fn show(plan: &Plan, machine: &Machine) -> Result<Option<display::vnc::Server>> {
    let keymap = match &plan.keyboard {
        Some(name) => Keymap::named(name).map_err(|e| Error::new(format!("-k: {e}")))?,
        None => Keymap::default(),
    };
    let fail = |e: display::FrontEndError| Error::new(format!("-vnc: {e}"));
    let front_end = FrontEnd::parse(&plan.display, &plan.blueprint.name, keymap).map_err(fail)?;
    let server = front_end.start(machine.displays()).map_err(fail)?;
    if let (true, Some(server)) = (plan.announce_display, &server) {
        println!("VNC server running on {}", server.address());
    }
    Ok(server)
}

/// The first accelerator of the list that works here.
fn accelerate(program: &str, plan: &Plan) -> Result<Acceleration> {
    let mut last = None;
    for (i, bag) in plan.accels.iter().enumerate() {
        // A /dev/kvm that cannot run ordinary guests is no reason to fail while there is something else to try.
        if bag.driver == "kvm" && i + 1 < plan.accels.len() && !machine::kvm_usable() {
            eprintln!("{program}: KVM cannot be used on this host");
            continue;
        }
        match machine::choose(bag) {
            Ok(found) => {
                if last.is_some() {
                    eprintln!("{program}: falling back to {}", bag.driver);
                }
                return Ok(found);
            }
            Err(e) => {
                eprintln!("{program}: {}: {e}", bag.driver);
                last = Some(e);
            }
        }
    }
    Err(Error::new(
        last.map_or_else(|| "no accelerator".into(), |e| format!("no accelerator can be used: {e}")),
    ))
}

fn start_monitors(
    plan: &Plan,
    opened: &BTreeMap<String, Opened>,
    remote: &Remote,
    acceleration: &Acceleration,
) -> Result<Arc<Context>> {
    let settings = Settings {
        name: plan.name.clone(),
        uuid: plan.uuid.clone(),
        kvm: acceleration.accel.name() == "kvm",
        kvm_present: machine::kvm_usable(),
        command_line: crate::introspect::command_line(),
        no_shutdown: plan.blueprint.actions.shutdown == machine::control::ShutdownAction::Pause,
    };
    let context = Context::new(remote.clone(), settings);
    {
        let mut all = context.chardevs.lock().unwrap_or_else(|e| e.into_inner());
        for (id, o) in opened {
            all.insert(id.clone(), CharEntry { chardev: o.chardev.clone(), used: true });
        }
    }
    *context.block_graph.lock().unwrap_or_else(|e| e.into_inner()) = plan.graph.clone();
    let fail = |e: std::io::Error| Error::new(format!("cannot start a monitor: {e}"));
    for (id, mode) in &plan.monitors {
        let Some(o) = opened.get(id) else { continue };
        let chardev = o.mux.as_ref().and_then(|m| m.share()).unwrap_or_else(|| o.chardev.clone());
        monitor::serve(&context, chardev, *mode).map_err(fail)?;
    }
    Ok(context)
}

/// `-gdb`: lets debuggers connect.
fn serve_debugger(text: &str, remote: &Remote) -> Result<()> {
    if text == "none" {
        return Ok(());
    }
    let at = |e: &dyn std::fmt::Display| Error::new(format!("-gdb {text}: {e}"));
    let mut bag = chardev::shorthand(text).map_err(|e| at(&e))?;
    bag.id = Some("gdb".into());
    if bag.driver == "socket" {
        // It listens, and the machine does not wait.
        for (key, value) in [("server", true), ("wait", false), ("nodelay", true)] {
            bag.props.insert(key.into(), value.into());
        }
        if !bag.props.contains_key("path") && !bag.props.contains_key("host") {
            bag.props.insert("host".into(), "127.0.0.1".into());
        }
    }
    let made = chardev::open(&bag).map_err(|e| at(&e))?;
    monitor::gdb::serve(remote, made.chardev).map_err(|e| at(&e))
}

/// Signals end the machine in order, and monitors are told.
fn watch_signals(remote: Remote) -> Result<()> {
    let fail = |e: std::io::Error| Error::new(format!("cannot handle signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(fail)?;
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            for _ in signals.forever() {
                remote.quit_because(Cause::HostSignal);
            }
        })
        .map_err(fail)?;
    Ok(())
}
