//! Times a virtual machine monitor from exec until its guest prints a line, and looks at what it cost.
//!
//! When the line has come the monitor is stopped first and looked at then, so that nothing it does afterwards counts.

use std::io::{Read, Seek};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// Where the kernel counts the exits of all its virtual machines.
const EXITS: &str = "/sys/kernel/debug/kvm/exits";
/// A trace buffer of our own.
const TRACE: &str = "/sys/kernel/tracing/instances/kvasir-stopwatch";

#[derive(clap::Args)]
pub struct Options {
    /// The text to wait for on the monitor's standard output
    #[arg(long, default_value = "KVASIR-GUEST-READY")]
    until: String,
    /// How long to wait, in seconds
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// Count the KVM exits until then (needs root and debugfs)
    #[arg(long)]
    exits: bool,
    /// Time the first entry into the guest (needs root and tracefs; costs a little time on every entry)
    #[arg(long)]
    first_entry: bool,
    /// The guest's memory in MiB: reports what the monitor uses beyond it
    #[arg(long, value_name = "MIB")]
    memory_beyond: Option<u64>,
    /// Printed before the figures
    #[arg(long, default_value = "STOPWATCH")]
    label: String,
    /// The monitor and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// What to find out beside the time.
#[derive(Default)]
pub struct Questions {
    pub exits: bool,
    pub first_entry: bool,
    /// Guest memory, MiB.
    pub memory_beyond: Option<u64>,
}

/// What came out of one run.
#[derive(Debug, Default)]
pub struct Reading {
    /// From exec until the line.
    pub line: Duration,
    /// From exec until the first entry into the guest.
    pub first_entry: Option<Duration>,
    /// KVM exits until the line.
    pub exits: Option<u64>,
    /// Memory beyond the guest's.
    pub memory: Option<Memory>,
}

/// Memory of a process without that of its guest, in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Anonymous memory: its own and nobody else's.
    pub private: u64,
    /// Everything present, shared libraries and the program itself included.
    pub resident: u64,
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let questions = Questions {
        exits: options.exits,
        first_entry: options.first_entry,
        memory_beyond: options.memory_beyond,
    };
    let limit = Duration::from_secs(options.timeout);
    let reading = time(&options.command, &options.until, limit, &questions)?;
    println!("{} {}", options.label, reading.words());
    Ok(ExitCode::SUCCESS)
}

impl Reading {
    /// The figures as `name=value` words.
    fn words(&self) -> String {
        let milliseconds = |time: Duration| format!("{:.3}", time.as_secs_f64() * 1e3);
        let mut words = vec![format!("line_ms={}", milliseconds(self.line))];
        if let Some(entry) = self.first_entry {
            words.push(format!("entry_ms={}", milliseconds(entry)));
        }
        if let Some(exits) = self.exits {
            words.push(format!("exits={exits}"));
        }
        if let Some(memory) = &self.memory {
            words.push(format!("private_kb={} resident_kb={}", memory.private, memory.resident));
        }
        words.join(" ")
    }
}

/// Kills the monitor on every way out.
struct Running(Child);

impl Running {
    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.0.id()).ok()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already; either way it is collected.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a monitor until its guest prints `until`. What the monitor says on standard error is shown if that fails.
pub fn time(command: &[String], until: &str, limit: Duration, questions: &Questions) -> Result<Reading> {
    let program = command.first().context("no command")?;
    let said = rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC).context("memfd")?;
    let mut said = std::fs::File::from(said);
    let reading = watched(command, until, limit, questions, said.try_clone()?);
    reading.with_context(|| {
        let mut text = String::new();
        // Without what it said the error is still one.
        let _ = said.rewind().and_then(|()| said.read_to_string(&mut text));
        match text.trim_end() {
            "" => format!("{program}: no line {until:?}"),
            text => format!("{program}: no line {until:?}; it said: {text}"),
        }
    })
}

fn watched(
    command: &[String],
    until: &str,
    limit: Duration,
    questions: &Questions,
    stderr: std::fs::File,
) -> Result<Reading> {
    let (program, arguments) = command.split_first().context("no command")?;
    let trace = if questions.first_entry { Some(Trace::start()?) } else { None };
    let exits_before = if questions.exits { count_exits()? } else { 0 };
    let mut monitor = Command::new(program);
    monitor.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    let start = Instant::now();
    let start_clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let mut child = Running(monitor.spawn().context("cannot run it")?);
    let output = child.0.stdout.take().context("no pipe")?;
    let line = wait_for(output, until, start, limit)?;
    if let Some(pid) = child.pid() {
        kill_process(pid, Signal::STOP).context("cannot stop it")?;
    }
    let mut reading = Reading { line, ..Reading::default() };
    if questions.exits {
        reading.exits = Some(count_exits()?.saturating_sub(exits_before));
    }
    if let Some(guest) = questions.memory_beyond {
        let smaps = format!("/proc/{}/smaps", child.0.id());
        let smaps = std::fs::read_to_string(&smaps).with_context(|| smaps.clone())?;
        reading.memory = Some(beyond_guest(&smaps, guest));
    }
    if let Some(trace) = trace {
        let since = Duration::new(start_clock.tv_sec.unsigned_abs(), start_clock.tv_nsec.try_into()?);
        reading.first_entry = Some(trace.first_entry()?.saturating_sub(since));
    }
    Ok(reading)
}

/// Waits until the text has appeared; the time since `start` when it had.
fn wait_for(
    output: impl Read + Send + 'static,
    text: &str,
    start: Instant,
    limit: Duration,
) -> Result<Duration> {
    let (sender, lines) = channel();
    let wanted = text.as_bytes().to_vec();
    std::thread::spawn(move || watch(output, &wanted, start, &sender));
    receive(&lines, start, limit)
}

/// Reads everything the monitor prints, also after the text was found, so that it never blocks on a full pipe.
fn watch(
    mut output: impl Read,
    wanted: &[u8],
    start: Instant,
    sender: &std::sync::mpsc::Sender<(Option<Duration>, Vec<u8>)>,
) {
    let mut seen: Vec<u8> = Vec::new();
    let mut buffer = [0; 4096];
    let mut found = false;
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        let now = start.elapsed();
        if found {
            continue;
        }
        seen.extend_from_slice(&buffer[..count]);
        if seen.windows(wanted.len()).any(|window| window == wanted) {
            found = true;
            // Whoever waited may have given up.
            let _ = sender.send((Some(now), Vec::new()));
        }
    }
    if !found {
        let _ = sender.send((None, seen));
    }
}

fn receive(
    lines: &Receiver<(Option<Duration>, Vec<u8>)>,
    start: Instant,
    limit: Duration,
) -> Result<Duration> {
    match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
        Ok((Some(time), _)) => Ok(time),
        Ok((None, seen)) => bail!("it ended after printing {:?}", tail(&seen)),
        Err(RecvTimeoutError::Timeout) => bail!("timeout after {} s", limit.as_secs()),
        Err(RecvTimeoutError::Disconnected) => bail!("its output cannot be read"),
    }
}

fn tail(seen: &[u8]) -> String {
    String::from_utf8_lossy(&seen[seen.len().saturating_sub(300)..]).into_owned()
}

fn count_exits() -> Result<u64> {
    let text = std::fs::read_to_string(EXITS).context(EXITS)?;
    text.trim().parse().context(EXITS)
}

/// Sums up `/proc/PID/smaps` without the guest's memory, which is recognized by its size.
pub fn beyond_guest(smaps: &str, guest_mib: u64) -> Memory {
    let guest = guest_mib * 1024;
    let mut total = Memory::default();
    let mut counted = true;
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let Some(value) = value.trim().strip_suffix(" kB").and_then(|value| value.trim().parse::<u64>().ok())
        else {
            continue;
        };
        match key {
            // A mapping may have grown together with a small neighbour.
            "Size" => counted = !(guest - guest / 8..=guest + guest / 8).contains(&value),
            "Rss" if counted => total.resident += value,
            "Anonymous" if counted => total.private += value,
            _ => {}
        }
    }
    total
}

/// A trace buffer that records the first entry into a guest, and then stops.
struct Trace {
    directory: PathBuf,
}

impl Trace {
    fn start() -> Result<Trace> {
        let trace = Trace { directory: PathBuf::from(TRACE) };
        if trace.directory.exists() {
            std::fs::remove_dir(&trace.directory).context(TRACE)?;
        }
        std::fs::create_dir(&trace.directory).context(TRACE)?;
        trace.set("trace_clock", "mono")?;
        trace.set("events/kvm/kvm_entry/trigger", "traceoff:1")?;
        trace.set("events/kvm/kvm_entry/enable", "1")?;
        trace.set("tracing_on", "1")?;
        Ok(trace)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.directory.join(file);
        std::fs::write(&path, value).with_context(|| path.display().to_string())
    }

    fn first_entry(&self) -> Result<Duration> {
        let path = self.directory.join("trace");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        parse_first_entry(&text).with_context(|| format!("{}: no entry into a guest", path.display()))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Failing to tidy up loses nothing: the next start does it.
        let _ = self.set("events/kvm/kvm_entry/enable", "0");
        let _ = std::fs::remove_dir(&self.directory);
    }
}

/// The time stamp of the first `kvm_entry` line: `task-pid [cpu] flags seconds.microseconds: kvm_entry: ...`.
fn parse_first_entry(text: &str) -> Option<Duration> {
    let line = text.lines().find(|line| !line.starts_with('#') && line.contains(" kvm_entry:"))?;
    let stamp = line.split(" kvm_entry:").next()?.trim_end().strip_suffix(':')?;
    let seconds: f64 = stamp.rsplit(' ').next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Runs a measurement several times and returns the readings in order of their time. A run that fails is repeated, up
/// to three times: QEMU's TCG now and then hangs early in a boot.
pub fn several(runs: usize, mut run: impl FnMut() -> Result<Reading>) -> Result<Vec<Reading>> {
    const ATTEMPTS: usize = 4;
    ensure!(runs > 0, "at least one run is needed");
    let mut readings = Vec::new();
    for _ in 0..runs {
        let mut attempt = 1;
        let reading = loop {
            match run() {
                Ok(reading) => break reading,
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(error) => eprintln!("xtask: {error:#}; trying once more"),
            }
            attempt += 1;
        };
        readings.push(reading);
    }
    readings.sort_by_key(|reading| reading.line);
    Ok(readings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<Reading> {
        let command = ["sh", "-c", script].map(str::to_owned);
        time(&command, "READY", limit, &Questions { memory_beyond: Some(512), ..Questions::default() })
    }

    #[test]
    fn finds_the_line_and_looks_at_the_process() {
        let reading = shell("echo some; echo REA''DY; sleep 100", Duration::from_secs(60)).expect("line");
        assert!(reading.memory.is_some_and(|memory| memory.resident > memory.private && memory.private > 0));
    }

    #[test]
    fn says_why_there_is_no_line() {
        let error = shell("echo nothing; echo complaint >&2", Duration::from_secs(60)).expect_err("no line");
        let text = format!("{error:#}");
        assert!(text.contains("nothing") && text.contains("complaint"), "{text}");
        let error = shell("sleep 100", Duration::from_millis(50)).expect_err("no line");
        assert!(format!("{error:#}").contains("timeout"), "{error:#}");
    }

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "\
7f00-7f01 rw-p 00000000 00:00 0 \nSize:             524292 kB\nRss:              100000 kB\nAnonymous:        100000 kB\n\
5500-5501 rw-p 00000000 00:00 0 [heap]\nSize:                132 kB\nRss:                 100 kB\nAnonymous:            80 kB\n\
7f10-7f11 r-xp 00000000 08:01 5 /usr/lib/libc.so.6\nSize:               2000 kB\nRss:                 900 kB\nAnonymous:             4 kB\n\
VmFlags: rd ex mr\n";
        assert_eq!(beyond_guest(smaps, 512), Memory { private: 84, resident: 1000 });
    }

    #[test]
    fn failed_runs_are_repeated_but_not_for_ever() {
        let mut calls = 0;
        let readings = several(2, || {
            calls += 1;
            ensure!(calls != 2, "hangs");
            Ok(Reading { line: Duration::from_millis(10 - calls), ..Reading::default() })
        });
        assert_eq!(readings.expect("readings")[0].line, Duration::from_millis(7));
        assert_eq!(calls, 3);
        assert!(several(1, || bail!("always")).is_err());
    }

    #[test]
    fn reads_a_trace() {
        let text = "# tracer: nop\n#\n            <...>-87      [000] d.... 12.345678: kvm_entry: vcpu 0, rip 0xfff0\n";
        assert_eq!(parse_first_entry(text), Some(Duration::from_micros(12_345_678)));
        assert_eq!(parse_first_entry("# tracer: nop\n"), None);
    }
}
