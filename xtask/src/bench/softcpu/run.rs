//! Runs the rows: in a guest of a monitor, or on this machine.
//!
//! The programs say on their output when a row begins and ends. At that moment the processor time that the monitor has
//! used is read, so that a row's work can be divided by it: other work on the machine then hardly changes the figure.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::image::{self, Image};
use crate::stopwatch;

/// Memory of the guests, MiB.
pub const MEMORY: u64 = 1024;
/// Boots that fail before a row is done, until the monitor is given up.
const ATTEMPTS: usize = 3;
/// Until a guest has started.
const START: Duration = Duration::from_secs(60);

/// What a row did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measure {
    /// Work done.
    pub units: f64,
    /// Time by the guest's (or this machine's) clock, seconds.
    pub seconds: f64,
    /// Processor time of the monitor (or the program), seconds.
    pub cpu: f64,
}

/// Results by row.
pub type Results = BTreeMap<String, Measure>;

/// Ends a monitor on every way out.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already; either way it is collected.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A line of output, when it came, and the processor time used by then.
struct Line {
    text: String,
    at: Instant,
    cpu: f64,
}

/// Runs rows in guests of the monitor that `command` makes (from "rows" and "seconds" of the kernel command line). A guest
/// that stops answering is started again for the rest.
pub fn guest(
    name: &str,
    rows: &[String],
    seconds: f64,
    command: impl Fn(&str) -> Command,
    mut finished: impl FnMut(&Child, &str) -> Result<()>,
) -> Result<Results> {
    let mut results = Results::new();
    let mut pending: Vec<String> = rows.to_vec();
    let mut failures = 0;
    while !pending.is_empty() {
        let append = format!(
            "console=ttyS0 quiet panic=-1 rdinit=/speed/init speed.seconds={seconds} speed.rows={}",
            pending.join(",")
        );
        match boot(command(&append), &mut pending, seconds, &mut results, &mut finished) {
            Ok(()) => {}
            Err(error) => {
                failures += 1;
                eprintln!("xtask: {name}: {error:#}");
                ensure!(failures < ATTEMPTS + rows.len(), "{name}: given up");
            }
        }
    }
    Ok(results)
}

/// One boot. Rows that are over, well or not, leave `pending`.
fn boot(
    mut command: Command,
    pending: &mut Vec<String>,
    seconds: f64,
    results: &mut Results,
    finished: &mut impl FnMut(&Child, &str) -> Result<()>,
) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = Running(command.spawn().with_context(|| format!("cannot run {command:?}"))?);
    let lines = watch(&mut child.0)?;
    let limit = Duration::from_secs_f64(120.0 + 10.0 * seconds);
    let mut row: Option<String> = None;
    let mut begin = None;
    let mut last = String::new();
    loop {
        let wait = if row.is_some() { limit } else { START };
        let line = match lines.recv_timeout(wait) {
            Ok(line) => line,
            Err(reason) => {
                let what = match reason {
                    RecvTimeoutError::Timeout => format!("nothing for {} s", wait.as_secs()),
                    RecvTimeoutError::Disconnected => "it ended".into(),
                };
                let Some(row) = row else { bail!("{what}, before a row; last line: {last}") };
                pending.retain(|name| *name != row);
                bail!("row {row}: {what}; last line: {last}");
            }
        };
        let words: Vec<&str> = line.text.split_whitespace().collect();
        match words[..] {
            ["SPEED-ROW", name] => row = Some(name.to_owned()),
            ["SPEED-BEGIN", _] => begin = Some(line.cpu),
            ["SPEED-END", name, units, seconds] => {
                let before = begin.take().context("the end of a row that did not begin")?;
                finished(&child.0, name)?;
                let measure = Measure {
                    units: units.parse().context("units")?,
                    seconds: seconds.parse().context("seconds")?,
                    cpu: line.cpu - before,
                };
                results.insert(name.to_owned(), measure);
                pending.retain(|other| other != name);
            }
            ["SPEED-FAILED", name] => {
                eprintln!("xtask: row {name} failed in the guest: {last}");
                pending.retain(|other| other != name);
            }
            ["SPEED-DONE"] => {
                // Rows that said nothing are not to be tried for ever.
                pending.clear();
                return Ok(());
            }
            _ => {}
        }
        last = line.text;
    }
}

/// Times a boot until the guest prints `until`.
pub fn until_line(mut command: Command, until: &str) -> Result<Measure> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = Running(command.spawn().with_context(|| format!("cannot run {command:?}"))?);
    let lines = watch(&mut child.0)?;
    loop {
        let line = lines.recv_timeout(START).ok().with_context(|| format!("no line {until}"))?;
        if line.text.contains(until) {
            return Ok(Measure { units: 1.0, seconds: (line.at - start).as_secs_f64(), cpu: line.cpu });
        }
    }
}

/// Reads the output in a thread of its own, which takes the processor time as each line of ours comes.
fn watch(child: &mut Child) -> Result<Receiver<Line>> {
    let output = child.stdout.take().context("no pipe")?;
    let process = child.id();
    let (sender, lines) = channel();
    std::thread::spawn(move || read(process, BufReader::new(output), &sender));
    Ok(lines)
}

fn read(process: u32, mut output: impl BufRead, sender: &Sender<Line>) {
    let mut bytes = Vec::new();
    while let Ok(1..) = output.read_until(b'\n', &mut bytes) {
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        let line = Line { cpu: processor_time(process).unwrap_or_default(), at: Instant::now(), text };
        bytes.clear();
        if sender.send(line).is_err() {
            return;
        }
    }
}

/// Processor time of a process, all threads that it has and had, in seconds.
fn processor_time(process: u32) -> Option<f64> {
    // Exact, but without the threads that have ended.
    let mut exact = 0u64;
    for task in std::fs::read_dir(format!("/proc/{process}/task")).ok()? {
        if let Ok(text) = std::fs::read_to_string(task.ok()?.path().join("schedstat")) {
            exact += text.split(' ').next()?.parse::<u64>().ok()?;
        }
    }
    let [user, system, _, _] = stat(&format!("/proc/{process}/stat"))?;
    Some((exact as f64 / 1e9).max(user + system))
}

/// utime, stime, cutime and cstime of a `/proc/PID/stat`, in seconds.
fn stat(path: &str) -> Option<[f64; 4]> {
    let text = std::fs::read_to_string(path).ok()?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let field = |index: usize| Some(fields.get(index)?.parse::<f64>().ok()? / ticks);
    Some([field(11)?, field(12)?, field(13)?, field(14)?])
}

/// Processor time of this process's ended children, seconds.
fn children() -> Option<f64> {
    let [_, _, user, system] = stat("/proc/self/stat")?;
    Some(user + system)
}

/// Runs rows on this machine, in a chroot of the same programs.
pub fn native(image: &Image, rows: &[String], seconds: f64) -> Result<Results> {
    let mut results = Results::new();
    let disk = image.root.join("speed/disk");
    std::fs::write(&disk, "").context("speed/disk")?;
    for row in rows {
        let mut command = image::chroot(&image.root, &["/speed/row", row, &seconds.to_string()]);
        command.env("SPEED_DISK", &image.disk);
        let before = children().context("/proc/self/stat")?;
        let output = command.output().context("unshare: cannot run")?;
        let cpu = children().context("/proc/self/stat")? - before;
        let text = String::from_utf8_lossy(&output.stdout);
        match parse_end(&text) {
            Some((name, units, seconds)) => {
                results.insert(name, Measure { units, seconds, cpu });
            }
            None => {
                let said = String::from_utf8_lossy(&output.stderr);
                eprintln!("xtask: row {row} fails on this machine: {text}{said}");
            }
        }
    }
    Ok(results)
}

fn parse_end(text: &str) -> Option<(String, f64, f64)> {
    text.lines().find_map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["SPEED-END", name, units, seconds] => {
            Some((name.to_owned(), units.parse().ok()?, seconds.parse().ok()?))
        }
        _ => None,
    })
}

/// Resident memory of a monitor beyond its guest's, MiB.
pub fn memory_beyond(process: u32) -> Result<f64> {
    let path = format!("/proc/{process}/smaps");
    let smaps = std::fs::read_to_string(Path::new(&path)).with_context(|| path.clone())?;
    Ok(stopwatch::beyond_guest(&smaps, MEMORY).resident as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_processor_time_is_found() {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        assert!(processor_time(std::process::id()).is_some_and(|seconds| seconds > 0.0));
        assert!(children().is_some());
    }

    #[test]
    fn a_guest_that_stops_is_started_again_for_the_rest() {
        // A "guest" that dies in row b, and knows its rows from the command line.
        const SCRIPT: &str = "for r in $(echo $0 | sed 's/.*speed.rows=//' | tr , ' '); do echo SPEED-ROW $r; echo SPEED-BEGIN $r;\
                              [ $r = b ] && exit 1; echo SPEED-END $r 7 0.5; done; echo SPEED-DONE";
        let rows = ["a", "b", "c"].map(str::to_owned);
        let mut boots = 0;
        let counter = std::cell::Cell::new(0);
        let command = |append: &str| {
            counter.set(counter.get() + 1);
            let mut command = Command::new("sh");
            command.args(["-c", SCRIPT, append]);
            command
        };
        let results = guest("test", &rows, 1.0, command, |_, _| {
            boots += 1;
            Ok(())
        });
        let results = results.expect("two rows");
        assert_eq!(results.keys().collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!((counter.get(), boots), (2, 2));
        assert_eq!(results["a"].units, 7.0);
    }
}
