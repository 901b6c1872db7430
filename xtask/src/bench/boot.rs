//! Boot to the first userspace line on the software CPU and under QEMU's TCG, on this machine, one after the other.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::stopwatch::{self, Questions, Reading};
use crate::{guest, lab, paths, tiny};

#[derive(clap::Args)]
pub struct Options {
    /// Runs of each; the table shows the fastest and the median
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Accelerator of Kvasir to measure, with options; may be given several times
    #[arg(long, value_name = "NAME[,...]", default_values = ["soft", "soft,translate=off"])]
    accel: Vec<String>,
    /// The kvasir program, instead of building one
    #[arg(long, value_name = "FILE")]
    kvasir: Option<PathBuf>,
    /// The QEMU to compare with
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// Only QEMU
    #[arg(long)]
    reference: bool,
    /// Seconds until a run of Kvasir is given up
    #[arg(long, default_value_t = 120)]
    timeout: u64,
}

/// Memory of the guests, MiB.
const MEMORY: u64 = 512;
const READY: &str = "KVASIR-GUEST-READY";
const APPEND: &str = "console=ttyS0 quiet kvasir.test=idle";

/// One monitor in one configuration.
struct Subject {
    name: String,
    /// The command without kernel.
    command: Vec<String>,
    kernel: [&'static str; 3],
    disk: Vec<String>,
    /// More words for the guest's kernel.
    append: String,
    /// When to give up a run.
    limit: Duration,
}

impl Subject {
    fn linux(&self, kernel: &Path, initramfs: &Path) -> Vec<String> {
        let [kernel_option, initramfs_option, append_option] = self.kernel;
        let mut command = self.tiny(kernel);
        debug_assert!(command.contains(&kernel_option.to_owned()));
        command.extend([initramfs_option.to_owned(), initramfs.display().to_string()]);
        command.extend([append_option.to_owned(), format!("{APPEND} {}", self.append).trim_end().to_owned()]);
        command
    }

    fn tiny(&self, kernel: &Path) -> Vec<String> {
        let mut command = self.command.clone();
        command.extend([self.kernel[0].to_owned(), kernel.display().to_string()]);
        command
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Tells the guest's kernel how fast the time-stamp counter is.
///
/// QEMU's microvm has nothing but the PIT to find out with. On a busy machine that fails, and the kernel then waits for
/// ever for a timer interrupt.
fn tsc_frequency() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": "));
    let megahertz: Option<f64> = value.and_then(|(_, number)| number.trim().parse().ok());
    megahertz.map_or_else(String::new, |megahertz| format!("tsc_early_khz={:.0}", megahertz * 1000.0))
}

fn qemu(program: &str, machine: &str, disk: &str) -> Subject {
    let disk = match machine {
        "microvm" => format!("-drive id=d,if=none,format=raw,file={disk} -device virtio-blk-device,drive=d"),
        _ => format!("-drive if=virtio,format=raw,file={disk}"),
    };
    Subject {
        name: format!("qemu tcg {machine}"),
        command: words(&format!(
            "{program} -accel tcg -machine {machine} -m {MEMORY} -smp 1 -nographic -net none -no-reboot"
        )),
        kernel: ["-kernel", "-initrd", "-append"],
        disk: words(&disk),
        append: if machine == "microvm" { tsc_frequency() } else { String::new() },
        // It takes a tenth of that, unless it hangs.
        limit: Duration::from_secs(20),
    }
}

fn kvasir(program: &Path, accel: &str, machine: &str, disk: &str, limit: Duration) -> Subject {
    let program = program.display();
    Subject {
        name: format!("kvasir {accel} {machine}"),
        command: words(&format!(
            "{program} run --accel {accel} --machine {machine} --memory {MEMORY}M --cpus 1 --no-reboot"
        )),
        kernel: ["--kernel", "--initrd", "--append"],
        disk: words(&format!("--disk {disk}")),
        append: String::new(),
        limit,
    }
}

fn subjects(options: &Options, disk: &str) -> Result<Vec<Subject>> {
    let mut subjects = vec![qemu(&options.qemu, "microvm", disk), qemu(&options.qemu, "q35", disk)];
    if !options.reference {
        let program = match &options.kvasir {
            Some(path) => path.canonicalize().with_context(|| path.display().to_string())?,
            None => lab::build_kvasir()?,
        };
        let limit = Duration::from_secs(options.timeout);
        for accel in &options.accel {
            subjects.extend(["microvm", "q35"].map(|machine| kvasir(&program, accel, machine, disk, limit)));
        }
    }
    Ok(subjects)
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let guest = guest::prepare(false)?;
    let directory = paths::cache()?.join("bench");
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let smallest = directory.join("tiny");
    paths::write_atomically(&smallest, &tiny::kernel(READY))?;
    let disk = directory.join("disk.raw");
    std::fs::File::create(&disk)?.set_len(64 << 20).with_context(|| disk.display().to_string())?;
    let disk = disk.display().to_string();

    println!(
        "| monitor | PVH kernel to first line, s | bzImage to first line, s | tiny guest to its line, ms | private, MB | resident, MB | of QEMU |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    let mut reference = None;
    for subject in subjects(options, &disk)? {
        let run = |command: Vec<String>, questions: &Questions| {
            stopwatch::several(options.runs, || stopwatch::time(&command, READY, subject.limit, questions))
        };
        let pvh = run(subject.linux(&guest.vmlinux(), &guest.initramfs()), &Questions::default())?;
        let bzimage = run(subject.linux(&guest.bzimage(), &guest.initramfs()), &Questions::default())?;
        let smallest = run(subject.tiny(&smallest), &Questions::default())?;
        let mut with_disk = subject.linux(&guest.vmlinux(), &guest.initramfs());
        with_disk.extend(subject.disk.iter().cloned());
        let memory = run(with_disk, &Questions { memory_beyond: Some(MEMORY), ..Questions::default() })?;
        let best = pvh[0].line.as_secs_f64();
        let base = *reference.get_or_insert(best);
        println!(
            "| {} | {} | {} | {} | {} | {:.2} |",
            subject.name,
            seconds(&pvh),
            seconds(&bzimage),
            milliseconds(&smallest),
            megabytes(&memory),
            best / base
        );
    }
    println!(
        "\nFastest (median) of {} runs; the last column is the PVH boot beside the first row's.",
        options.runs
    );
    Ok(ExitCode::SUCCESS)
}

fn fastest_and_median(readings: &[Reading]) -> (f64, f64) {
    let at = |index: usize| readings[index].line.as_secs_f64();
    (at(0), at(readings.len() / 2))
}

fn seconds(readings: &[Reading]) -> String {
    let (fastest, median) = fastest_and_median(readings);
    format!("{fastest:.2} ({median:.2})")
}

fn milliseconds(readings: &[Reading]) -> String {
    let (fastest, median) = fastest_and_median(readings);
    format!("{:.1} ({:.1})", fastest * 1e3, median * 1e3)
}

fn megabytes(readings: &[Reading]) -> String {
    let memory = readings.iter().filter_map(|reading| reading.memory.as_ref());
    let least = memory.min_by_key(|memory| memory.resident);
    least.map_or("- | -".into(), |memory| {
        format!("{:.2} | {:.2}", memory.private as f64 / 1024.0, memory.resident as f64 / 1024.0)
    })
}
