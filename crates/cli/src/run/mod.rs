//! `kvasir run`: a virtual machine in this terminal.

mod args;
mod disks;
mod net;

pub(crate) use args::Args;

use crate::curses::Curses;
use crate::terminal::{self, Escape, HELP, RawMode, Stdio};
use crate::{Failure, status};
use machine::{Chardevs, Machine, Outcome};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use std::sync::Arc;

pub(crate) fn main(args: &Args) -> Result<u8, Failure> {
    if let Some(text) = args.help_wanted()? {
        print!("{text}");
        return Ok(0);
    }
    let stdio = Arc::new(Stdio::default());
    let mut chardevs: Chardevs = args.chardevs()?;
    let blueprint = args.blueprint(&mut chardevs, &stdio)?;
    let acceleration = machine::choose(&blueprint.accel)?;
    eprintln!(
        "kvasir: '{}' on {}{}",
        blueprint.name,
        acceleration.reason,
        if args.uses_terminal() || args.is_screen() { "; Ctrl-A h for help, Ctrl-A x to quit" } else { "" }
    );
    let front_end = args.front_end()?;
    let mut machine = Machine::new(blueprint, &acceleration, chardevs)?;
    let server = front_end.start(machine.displays()).map_err(Failure::usage)?;
    if let Some(server) = &server {
        eprintln!("kvasir: VNC at {}", server.address());
        if let Some(address) = server.websocket() {
            eprintln!("kvasir: for browsers at http://{address}/");
        }
    }
    let raw = if args.uses_terminal() || args.is_screen() {
        RawMode::enter().map_err(|e| Failure {
            status: status::HOST,
            message: format!("cannot set up the terminal: {e}"),
        })?
    } else {
        None
    };
    let remote = machine.remote();
    let asked = remote.clone();
    let ask = move |escape| match escape {
        Escape::Quit => asked.quit(),
        Escape::PowerButton => asked.power_button(),
        Escape::Reset => asked.reset(),
        Escape::Help => eprint!("{HELP}"),
        Escape::Monitor => eprint!("\r\n(the monitor is not available in this version)\r\n"),
    };
    let mut curses = None;
    if args.is_screen() {
        let started = Curses::start(machine.displays(), args.keymap()?, ask);
        curses = Some(
            started
                .map_err(|e| Failure { status: status::HOST, message: format!("--display curses: {e}") })?,
        );
    } else if args.uses_terminal() {
        stdio.spawn_reader(ask).map_err(|e| Failure {
            status: status::HOST,
            message: format!("cannot read standard input: {e}"),
        })?;
    }
    watch_signals(remote, stdio)?;
    let outcome = machine.run();
    drop(curses);
    if args.stats {
        for (name, value) in machine.stats() {
            eprintln!("{name:<40} {value}");
        }
    }
    drop(server);
    drop(machine);
    drop(raw);
    match outcome? {
        Outcome::PoweredOff | Outcome::Quit => Ok(0),
        Outcome::Exited(code) => Ok(code),
        Outcome::Reset => Ok(status::GUEST_RESET),
        Outcome::Panicked => {
            Err(Failure { status: status::GUEST_PANIC, message: "the guest panicked".into() })
        }
        Outcome::Broken(text) => Err(Failure { status: status::BROKEN, message: text }),
    }
}

/// Ends the machine in order when the user or the system ends us, and passes the window's size on.
fn watch_signals(remote: machine::Remote, stdio: Arc<Stdio>) -> Result<(), Failure> {
    let fail =
        |e: std::io::Error| Failure { status: status::HOST, message: format!("cannot handle signals: {e}") };
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGWINCH]).map_err(fail)?;
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGWINCH => stdio.resized(),
                    _ => {
                        remote.quit_because(machine::Cause::HostSignal);
                        terminal::restore();
                    }
                }
            }
        })
        .map_err(fail)?;
    Ok(())
}
