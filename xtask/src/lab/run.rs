//! Running a scenario, in the lab host or directly, and learning how it ended.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::paths;

use super::host::Host;
use super::scenario::{self, Scenario};
use super::{Material, programs};

/// How a scenario ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It ran to its end with this status; 0 is success.
    Finished(i32),
    /// The lab host ended without a result.
    HostDied,
    /// The lab host's kernel says that a processor of it is stuck.
    Wedged,
    /// It was given up.
    TimedOut(Duration),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Finished(0) => f.write_str("passed"),
            Outcome::Finished(status) => write!(f, "failed with status {status}"),
            Outcome::HostDied => f.write_str("the lab host ended without a result"),
            Outcome::Wedged => f.write_str("a processor of the lab host got stuck"),
            Outcome::TimedOut(limit) => write!(f, "no result within {} s", limit.as_secs()),
        }
    }
}

/// Kills the lab host on every way out.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already; either way it is collected.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the lab host and follows its console until the result line, its end, or the time limit.
pub fn in_host(host: &Host, name: &str, limit: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let child = Command::new(programs::QEMU)
        .args(host.arguments())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| {
            format!("{}: cannot run; as root: apt-get install qemu-system-x86", programs::QEMU)
        })?;
    let mut child = Running(child);
    let console = child.0.stdout.take().context("no pipe")?;
    let mut log = open_log(name)?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for_each_line(console, |line| sender.send(line).is_ok());
    });
    loop {
        match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => {
                show(name, start, &line, &mut log)?;
                if let Some(status) = result_line(&line, name) {
                    return Ok(Outcome::Finished(status));
                }
                if says_stuck(&line) {
                    return Ok(Outcome::Wedged);
                }
            }
            Err(RecvTimeoutError::Timeout) => return Ok(Outcome::TimedOut(limit)),
            Err(RecvTimeoutError::Disconnected) => return Ok(Outcome::HostDied),
        }
    }
}

/// Runs the scenario's script on this host, which has KVM itself.
pub fn direct(scenario: &Scenario, material: &Material) -> Result<Outcome> {
    let start = Instant::now();
    let own = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new("timeout");
    command.arg(scenario.timeout.to_string()).arg("sh").arg(&scenario.path);
    command.env("LAB", scenario::directory()).env("LAB_GUEST", &material.guest.directory);
    command.env("LAB_TINY", &material.tiny).env("XTASK", own).env("QEMU", programs::QEMU);
    if let Some(kvasir) = &material.kvasir {
        command.env("KVASIR", kvasir);
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("timeout: cannot run")?;
    let mut child = Running(child);
    let mut log = open_log(&scenario.name)?;
    let mut shown = Ok(());
    for_each_line(child.0.stdout.take().context("no pipe")?, |line| {
        shown = show(&scenario.name, start, &line, &mut log);
        shown.is_ok()
    });
    shown?;
    // 124 is how timeout(1) says that it had to end the command.
    match child.0.wait().context("cannot wait")?.code() {
        Some(124) => Ok(Outcome::TimedOut(Duration::from_secs(scenario.timeout))),
        Some(status) => Ok(Outcome::Finished(status)),
        None => Ok(Outcome::HostDied),
    }
}

/// Connects the terminal to the lab host's shell.
pub fn interactive(host: &Host) -> Result<ExitCode> {
    let status = Command::new(programs::QEMU).args(host.arguments()).status();
    let status = status.with_context(|| format!("{}: cannot run", programs::QEMU))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn open_log(name: &str) -> Result<std::fs::File> {
    let directory = paths::cache()?.join("lab");
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let path = directory.join(format!("{name}.log"));
    std::fs::File::create(&path).with_context(|| path.display().to_string())
}

fn show(name: &str, start: Instant, line: &str, log: &mut std::fs::File) -> Result<()> {
    writeln!(log, "{line}").context("cannot write the log")?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{name} {:7.2} | {line}", start.elapsed().as_secs_f64()).context("cannot write")?;
    Ok(())
}

/// Calls `act` for each line, without line ends and control sequences, until it returns false.
fn for_each_line(input: impl Read, mut act: impl FnMut(String) -> bool) {
    let mut input = BufReader::new(input);
    let mut line = Vec::new();
    // A guest that never ends its line must not fill the memory.
    while let Ok(1..) = (&mut input).take(64 << 10).read_until(b'\n', &mut line) {
        if !act(clean(&line)) {
            return;
        }
        line.clear();
    }
}

/// A console line as text: firmware and kernels send escape sequences that would upset the terminal.
fn clean(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == '\x1b' {
            if characters.next_if_eq(&'[').is_some() {
                while characters.next_if(|next| !('@'..='~').contains(next)).is_some() {}
            }
            characters.next();
        } else if !character.is_control() || character == '\t' {
            out.push(character);
        }
    }
    out
}

/// Whether a console line is the kernel's complaint about a processor that makes no progress.
///
/// Under emulation that is an interrupt lost for good: waiting for the time limit would gain nothing.
fn says_stuck(line: &str) -> bool {
    line.starts_with('[') && line.contains("watchdog: BUG: soft lockup")
}

/// The status in `LAB-RESULT scenario status`.
fn result_line(line: &str, name: &str) -> Option<i32> {
    line.strip_prefix("LAB-RESULT ")?.trim().strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines() {
        assert_eq!(result_line("LAB-RESULT boot 0", "boot"), Some(0));
        assert_eq!(result_line("LAB-RESULT boot 3", "boot"), Some(3));
        assert_eq!(result_line("LAB-RESULT boot-two 0", "boot"), None);
        assert_eq!(result_line("echo LAB-RESULT boot 0", "boot"), None);
    }

    #[test]
    fn a_stuck_processor() {
        assert!(says_stuck("[  220.448599] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [vcpu0:262]"));
        assert!(
            !says_stuck("    [  220.448599] watchdog: BUG: soft lockup"),
            "a guest's output, shown by a scenario"
        );
    }

    #[test]
    fn control_sequences_go_and_text_stays() {
        assert_eq!(clean(b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n"), "SeaBIOS");
        let mut lines = Vec::new();
        for_each_line(&b"one\ntwo\r\nthree"[..], |line| {
            lines.push(line);
            true
        });
        assert_eq!(lines, ["one", "two", "three"]);
    }
}
