//! The software CPU beside QEMU's TCG and beside this machine itself: one row for each kind of work.
//!
//! Every row runs the same programs in the same initramfs under the same kernel, natively, in Kvasir and in each QEMU, one
//! after the other.

mod image;
mod qemu;
mod report;
mod rows;
mod run;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use self::image::Image;
use self::qemu::Qemu;
use self::report::{Clock, Line};
use self::rows::{Guest, Row};
use self::run::{MEMORY, Measure, Results};
use crate::{lab, paths};

#[derive(clap::Args)]
pub struct Options {
    /// Only these rows, or families of rows ("aes")
    #[arg(long, value_delimiter = ',', value_name = "ROW")]
    only: Vec<String>,
    /// Half a second a row and one boot, instead of two seconds and three
    #[arg(long)]
    quick: bool,
    /// Seconds a row
    #[arg(long)]
    seconds: Option<f64>,
    /// What to divide by
    #[arg(long, value_enum, default_value = "cpu")]
    clock: Clock,
    /// The kvasir program, instead of building one
    #[arg(long, value_name = "FILE")]
    kvasir: Option<PathBuf>,
    /// Accelerator and its options for Kvasir
    #[arg(long, default_value = "soft")]
    accel: String,
    /// An installed QEMU
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// Leave out the QEMU of the backports suite
    #[arg(long)]
    installed_only: bool,
    /// Leave QEMU's and this machine's results as they are in the JSON file of an earlier run
    #[arg(long)]
    reuse: bool,
    /// Where to write the results (default: in the cache directory)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to write a picture of the results
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
}

/// Something that runs guests.
enum Monitor {
    Kvasir { program: PathBuf, accel: String },
    Qemu(Qemu),
}

/// What a guest is made of.
struct Setting<'a> {
    machine: &'a str,
    vcpus: u32,
    kernel: &'a Path,
    initramfs: &'a Path,
    append: &'a str,
    disk: Option<&'a Path>,
}

impl Monitor {
    fn name(&self) -> String {
        match self {
            Monitor::Kvasir { .. } => "kvasir".into(),
            Monitor::Qemu(qemu) => format!("qemu {}", qemu.version),
        }
    }

    fn command(&self, setting: &Setting<'_>) -> Command {
        let (memory, vcpus) = (MEMORY.to_string(), setting.vcpus.to_string());
        let Setting { machine, kernel, initramfs, append, .. } = setting;
        match self {
            Monitor::Kvasir { program, accel } => {
                let mut command = Command::new(program);
                command.args(["run", "--accel", accel, "--machine", machine, "--no-reboot"]);
                command.args(["--memory", &format!("{memory}M"), "--cpus", &vcpus]);
                command.arg("--kernel").arg(kernel).arg("--initrd").arg(initramfs).args(["--append", append]);
                if let Some(disk) = setting.disk {
                    command.arg("--disk").arg(format!("{},format=raw", disk.display()));
                }
                command
            }
            Monitor::Qemu(qemu) => {
                let mut command = qemu.command();
                command.args(["-accel", "tcg,thread=multi", "-machine", machine, "-cpu", "max"]);
                command.args(["-m", &memory, "-smp", &vcpus, "-display", "none", "-monitor", "none"]);
                command.args(["-serial", "stdio", "-net", "none", "-no-reboot"]);
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs).args(["-append", append]);
                if let Some(disk) = setting.disk {
                    command.arg("-drive").arg(format!("if=virtio,format=raw,file={}", disk.display()));
                }
                command
            }
        }
    }
}

/// How much to do.
struct Effort {
    seconds: f64,
    boots: usize,
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let rows = rows::select(&options.only)?;
    let effort = Effort {
        seconds: options.seconds.unwrap_or(if options.quick { 0.5 } else { 2.0 }),
        boots: if options.quick { 1 } else { 3 },
    };
    ensure!(effort.seconds > 0.0 && effort.seconds <= 600.0, "--seconds: use 0.1 to 600");
    let image = image::prepare()?;
    let program = match &options.kvasir {
        Some(path) => path.canonicalize().with_context(|| path.display().to_string())?,
        None => lab::build_kvasir()?,
    };
    let mut peers = vec![Qemu::installed(&options.qemu)?];
    if !options.installed_only {
        peers.push(Qemu::newest()?);
    }
    let json = match &options.json {
        Some(path) => path.clone(),
        None => paths::cache()?.join("speed/results.json"),
    };
    let earlier = if options.reuse { Earlier::read(&json)? } else { Earlier::default() };
    let versions: Vec<String> = peers.iter().map(|qemu| qemu.version.clone()).collect();

    let native = match options.reuse {
        true => earlier.results("native"),
        false => native(&image, &rows, &effort)?,
    };
    let kvasir = Monitor::Kvasir { program, accel: options.accel.clone() };
    let ours = measure(&kvasir, &image, &rows, &effort)?;
    let mut theirs = Vec::new();
    for qemu in peers {
        theirs.push(match options.reuse {
            true => earlier.results(&qemu.version),
            false => measure(&Monitor::Qemu(qemu), &image, &rows, &effort)?,
        });
    }
    let lines: Vec<Line> = rows
        .iter()
        .map(|row| Line {
            row,
            native: native.get(row.name).copied(),
            kvasir: ours.get(row.name).copied(),
            tcg: theirs.iter().map(|results| results.get(row.name).copied()).collect(),
        })
        .collect();
    print!("{}", report::table(&lines, &versions, options.clock));
    let text = serde_json::to_string_pretty(&report::to_json(&lines, &versions, options.clock))?;
    paths::write_atomically(&json, text.as_bytes())?;
    eprintln!("xtask: results are in {}", json.display());
    if let Some(path) = &options.chart {
        paths::write_atomically(path, report::chart(&lines, options.clock).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Names of the rows of a kind; the row of two vCPUs is measured as two.
fn names(rows: &[&Row], guest: Guest) -> Vec<String> {
    let of_kind = rows.iter().filter(|row| row.guest == guest);
    match guest {
        Guest::Dual => of_kind.flat_map(|_| ["threads1", "threads2"]).map(str::to_owned).collect(),
        Guest::Idle => of_kind.take(1).map(|_| "idle".to_owned()).collect(),
        _ => of_kind.map(|row| row.name.to_owned()).collect(),
    }
}

fn native(image: &Image, rows: &[&Row], effort: &Effort) -> Result<Results> {
    eprintln!("xtask: native");
    let mut wanted = names(rows, Guest::Single);
    wanted.extend(names(rows, Guest::Disk));
    wanted.extend(names(rows, Guest::Dual));
    let mut results = run::native(image, &wanted, effort.seconds)?;
    scale(&mut results);
    Ok(results)
}

/// Makes the row `threads` of its two halves: how much two threads did of what one did, by processor time. Time that a
/// thread waited for a processor of a busy machine does not count, time it spent waiting for the other does.
fn scale(results: &mut Results) {
    let (Some(one), Some(two)) = (results.remove("threads1"), results.remove("threads2")) else { return };
    let units = 2.0 * (two.units / two.cpu) / (one.units / one.cpu);
    results.insert("threads".into(), Measure { units, ..two });
}

/// Runs all rows in a monitor.
fn measure(monitor: &Monitor, image: &Image, rows: &[&Row], effort: &Effort) -> Result<Results> {
    let name = monitor.name();
    eprintln!("xtask: {name}");
    let kernel = image.guest.vmlinux();
    let mut results = Results::new();
    let mut memory = None;
    for (kind, vcpus) in [(Guest::Single, 1), (Guest::Disk, 1), (Guest::Dual, 2), (Guest::Idle, 1)] {
        let disk = (kind == Guest::Disk).then_some(image.disk.as_path());
        let command = |append: &str| {
            monitor.command(&Setting {
                machine: "q35",
                vcpus,
                kernel: &kernel,
                initramfs: &image.initramfs,
                append,
                disk,
            })
        };
        let seconds = if kind == Guest::Idle { effort.seconds.max(3.0) } else { effort.seconds };
        let found = run::guest(&name, &names(rows, kind), seconds, command, |child, row| {
            if row == "idle" {
                memory = Some(run::memory_beyond(child.id())?);
            }
            Ok(())
        })?;
        results.extend(found);
    }
    scale(&mut results);
    if let Some(idle) = results.get_mut("idle") {
        idle.units = 100.0 * idle.cpu / idle.seconds;
        let memory = memory.map(|units| Measure { units, ..*idle });
        results.extend(memory.map(|memory| ("memory".to_owned(), memory)));
    }
    for row in rows.iter().filter(|row| row.guest == Guest::Boot) {
        let machine = if row.name == "boot" { "q35" } else { "microvm" };
        let mut best: Option<Measure> = None;
        for _ in 0..effort.boots {
            let command = monitor.command(&Setting {
                machine,
                vcpus: 1,
                kernel: &kernel,
                initramfs: &image.guest.initramfs(),
                append: "console=ttyS0 quiet kvasir.test=idle",
                disk: None,
            });
            match run::until_line(command, "KVASIR-GUEST-READY") {
                Ok(measure) => {
                    let better = best.take_if(|best| best.cpu < measure.cpu);
                    best = Some(better.unwrap_or(measure));
                }
                Err(error) => eprintln!("xtask: {name}: {}: {error:#}", row.name),
            }
        }
        results.extend(best.map(|best| (row.name.to_owned(), best)));
    }
    Ok(results)
}

/// Results of an earlier run.
#[derive(Default)]
struct Earlier(BTreeMap<String, Results>);

impl Earlier {
    fn read(path: &Path) -> Result<Earlier> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("{}: run once without --reuse", path.display()))?;
        let all: serde_json::Value =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let measure = |value: &serde_json::Value| {
            let number = |name: &str| value.get(name)?.as_f64();
            Some(Measure {
                units: number("units")?,
                seconds: number("seconds")?,
                cpu: number("cpu-seconds")?,
            })
        };
        let mut earlier = BTreeMap::<String, Results>::new();
        for row in all["rows"].as_array().into_iter().flatten() {
            let Some(name) = row["row"].as_str() else { continue };
            let tcg = row["tcg"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(version, value)| (version.as_str(), value));
            for (who, value) in tcg.chain([("native", &row["native"])]) {
                if let Some(measure) = measure(value) {
                    earlier.entry(who.to_owned()).or_default().insert(name.to_owned(), measure);
                }
            }
        }
        Ok(Earlier(earlier))
    }

    fn results(&self, who: &str) -> Results {
        self.0.get(who).cloned().unwrap_or_default()
    }
}
