//! The image tool beside `qemu-img`, `qemu-nbd` and `qemu-io`: the same command lines, one after the other, on the same images.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::resources::{Usage, run_measured};
use crate::{lab, qemu};

#[derive(clap::Args)]
pub struct Options {
    /// Runs of each; the table shows the fastest
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Virtual size of the disk that is converted, in MiB: an eighth random, two eighths text, an eighth stored zeros, the rest holes
    #[arg(long, default_value_t = 8192)]
    size: u64,
    /// Clusters of the large image that is checked and mapped
    #[arg(long, default_value_t = 2_000_000)]
    clusters: u64,
    /// Requests of each measurement over NBD
    #[arg(long, default_value_t = 100_000)]
    requests: u64,
    /// Where to put the images; several GiB
    #[arg(long, default_value = "/var/tmp")]
    directory: PathBuf,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// The kvasir program, instead of building one
    #[arg(long, value_name = "FILE")]
    kvasir: Option<PathBuf>,
    /// Directory with QEMU's tools; by default $KVASIR_QEMU_BIN, or the newest that Debian offers
    #[arg(long, value_name = "DIR")]
    qemu: Option<PathBuf>,
}

/// Both tools, and where they work.
struct Bench<'a> {
    options: &'a Options,
    /// QEMU's, ours: directories with programs of the same names.
    tools: [PathBuf; 2],
    dir: PathBuf,
}

/// Fast random numbers, the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

const MIB: u64 = 1 << 20;

/// Words of a text, in random order: compresses about as source code does.
fn text(random: &mut Random, out: &mut Vec<u8>, len: usize) {
    const WORDS: [&str; 32] = [
        "let", "the", "result", "image", "cluster", "offset", "return", "match", "write", "read", "table",
        "if", "else", "struct", "block", "size", "entry", "fn", "of", "and", "is", "device", "guest",
        "memory", "self", "Ok", "error", "count", "range", "for", "while", "number",
    ];
    let end = out.len() + len;
    while out.len() < end {
        let r = random.next();
        out.extend(WORDS[(r % 32) as usize].as_bytes());
        out.push(b" \n(;.:="[(r >> 8) as usize % 7]);
        if r >> 60 == 0 {
            out.extend(format!("{:x}", r >> 16).as_bytes());
        }
    }
    out.truncate(end);
}

/// The disk to convert.
fn make_source(path: &Path, mib: u64) -> Result<()> {
    let mut random = Random(0x1234_5678_9abc_def1);
    let file = File::create(path).with_context(|| path.display().to_string())?;
    file.set_len(mib * MIB)?;
    let mut out = BufWriter::new(&file);
    let mut piece = Vec::new();
    for i in 0..mib {
        piece.clear();
        match i % 8 {
            0 => piece.extend((0..MIB / 8).flat_map(|_| random.next().to_le_bytes())),
            2 | 5 => text(&mut random, &mut piece, MIB as usize),
            6 => piece.resize(MIB as usize, 0),
            _ => continue,
        }
        std::io::Seek::seek(&mut out, std::io::SeekFrom::Start(i * MIB))?;
        out.write_all(&piece)?;
    }
    out.flush()?;
    Ok(())
}

/// What a row measures.
struct Row<'a> {
    name: &'a str,
    target: f64,
    /// File that the command makes; removed before each run. Its size is shown.
    makes: Option<&'a str>,
    program: &'a str,
    args: Vec<&'a str>,
    /// How often in one measurement, for commands that are over at once.
    repeat: u32,
}

impl Bench<'_> {
    fn command(&self, which: usize, program: &str) -> Command {
        let mut command = Command::new(self.tools[which].join(program));
        command.current_dir(&self.dir);
        command
    }

    /// Runs one of our own tools for preparation.
    fn prepare(&self, program: &str, args: &[&str]) -> Result<()> {
        let output = self.command(1, program).args(args).output()?;
        ensure!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn measure(&self, row: &Row<'_>) -> Result<()> {
        if !row.name.contains(&self.options.only) {
            return Ok(());
        }
        let mut best = [Usage::WORST; 2];
        let mut sizes = [0u64; 2];
        for _ in 0..self.options.runs {
            for which in [0, 1] {
                let mut sum = Usage::default();
                for _ in 0..row.repeat {
                    if let Some(made) = row.makes {
                        // It is not there the first time.
                        let _ = std::fs::remove_file(self.dir.join(made));
                    }
                    let mut command = self.command(which, row.program);
                    command.args(&row.args).stdout(Stdio::null());
                    sum.add(&run_measured(&mut command)?);
                }
                best[which].keep_best(&sum);
                if let Some(made) = row.makes {
                    sizes[which] = std::fs::metadata(self.dir.join(made)).map_or(0, |m| m.len());
                }
            }
        }
        let [theirs, ours] = &best;
        let ratio = theirs.wall.as_secs_f64() / ours.wall.as_secs_f64();
        let mut notes =
            format!("{:.1} / {:.1} MB", theirs.peak_kib as f64 / 1024.0, ours.peak_kib as f64 / 1024.0);
        if sizes[0] > 0 {
            notes.push_str(&format!("; file {:.2} / {:.2} MB", sizes[0] as f64 / 1e6, sizes[1] as f64 / 1e6));
        }
        self.print(row.name, &seconds(theirs), &seconds(ours), ratio, row.target, &notes);
        Ok(())
    }

    fn print(&self, name: &str, theirs: &str, ours: &str, ratio: f64, target: f64, notes: &str) {
        let mark = if ratio >= target { "" } else { ", missed" };
        println!("| {name} | {theirs} | {ours} | {ratio:.2} (target {target}{mark}) | {notes} |");
    }

    fn conversions(&self) -> Result<()> {
        make_source(&self.dir.join("raw"), self.options.size)?;
        self.prepare("qemu-img", &["convert", "-O", "qcow2", "raw", "qcow2"])?;
        self.prepare("qemu-img", &["convert", "-O", "vdi", "raw", "vdi"])?;
        self.prepare("qemu-img", &["convert", "-O", "vhdx", "raw", "vhdx"])?;
        self.prepare(
            "qemu-img",
            &["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "vmdk"],
        )?;
        let convert = |name, target, args: &[&'static str]| {
            let args = [&["convert"][..], args, &["out"]].concat();
            self.measure(&Row { name, target, makes: Some("out"), program: "qemu-img", args, repeat: 1 })
        };
        convert("convert raw to qcow2", 1.5, &["-f", "raw", "-O", "qcow2", "raw"])?;
        convert("convert qcow2 to raw", 1.5, &["-f", "qcow2", "-O", "raw", "qcow2"])?;
        convert("convert qcow2 to qcow2", 1.5, &["-f", "qcow2", "-O", "qcow2", "qcow2"])?;
        convert("convert -c zlib", 2.0, &["-f", "raw", "-O", "qcow2", "-c", "raw"])?;
        let zstd = ["-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "raw"];
        convert("convert -c zstd", 2.0, &zstd)?;
        convert("convert vmdk streamOptimized to qcow2", 1.5, &["-f", "vmdk", "-O", "qcow2", "vmdk"])?;
        convert("convert vdi to qcow2", 1.5, &["-f", "vdi", "-O", "qcow2", "vdi"])?;
        convert("convert vhdx to qcow2", 1.5, &["-f", "vhdx", "-O", "qcow2", "vhdx"])?;
        self.measure(&Row {
            name: "compare equal images, raw and qcow2",
            target: 1.5,
            makes: None,
            program: "qemu-img",
            args: vec!["compare", "-f", "raw", "-F", "qcow2", "raw", "qcow2"],
            repeat: 1,
        })
    }

    /// An image of 1 TiB in which every other cluster of a range is allocated.
    fn make_large(&self) -> Result<()> {
        let clusters = self.options.clusters * 2;
        let size = (clusters * 65536).to_string();
        self.prepare(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "large", &size],
        )?;
        let mut io = self
            .command(1, "qemu-io")
            .args(["-f", "qcow2", "-d", "unmap", "-t", "unsafe", "large"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        {
            let mut input = BufWriter::new(io.stdin.take().context("qemu-io takes no commands")?);
            for i in (0..clusters).step_by(2) {
                writeln!(input, "discard -q {} 65536", i * 65536)?;
            }
            input.flush()?;
        }
        ensure!(io.wait()?.success(), "qemu-io cannot fragment the large image");
        self.prepare("qemu-img", &["resize", "-q", "large", &(1u64 << 40).to_string()])
    }

    fn metadata(&self) -> Result<()> {
        if ["check", "map"].iter().any(|n| n.contains(&self.options.only) || self.options.only.contains(n)) {
            self.make_large()?;
            let row = |name, args| {
                self.measure(&Row { name, target: 3.0, makes: None, program: "qemu-img", args, repeat: 1 })
            };
            row("check 1 TiB, 2 million clusters", vec!["check", "-f", "qcow2", "large"])?;
            row("map 1 TiB, 2 million clusters", vec!["map", "-f", "qcow2", "--output=json", "large"])?;
        }
        let quick = |name, makes, args| {
            self.measure(&Row { name, target: 3.0, makes, program: "qemu-img", args, repeat: 20 })
        };
        quick("create qcow2", Some("new"), vec!["create", "-q", "-f", "qcow2", "new", "100G"])?;
        self.prepare("qemu-img", &["create", "-q", "-f", "qcow2", "small", "100G"])?;
        quick("info", None, vec!["info", "-f", "qcow2", "small"])?;
        quick("snapshot -l", None, vec!["snapshot", "-l", "small"])?;
        quick("start of process (--version)", None, vec!["--version"])
    }

    /// Starts a server on an image; returns when it listens.
    fn serve(&self, which: usize, image: &str) -> Result<Child> {
        let socket = self.dir.join("socket");
        // It is not there the first time.
        let _ = std::fs::remove_file(&socket);
        let child = self
            .command(which, "qemu-nbd")
            .args(["-t", "-e", "4", "-f", "qcow2", "--discard=unmap", "-k"])
            .args([socket.as_os_str(), image.as_ref()])
            .stdin(Stdio::null())
            .spawn()?;
        let started = Instant::now();
        while !socket.exists() {
            ensure!(started.elapsed() < Duration::from_secs(10), "the NBD server does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(child)
    }

    fn nbd(&self) -> Result<()> {
        if !"nbd".contains(&self.options.only) && !self.options.only.contains("nbd") {
            return Ok(());
        }
        // All clusters allocated; and an overlay on it.
        self.prepare("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "disk", "1G"])?;
        let requests = self.options.requests.to_string();
        for (image, what) in [("disk", ""), ("over", " on a backing file")] {
            for (flag, verb) in [("", "read"), ("-w", "write")] {
                let mut best = [f64::MAX; 2];
                for _ in 0..self.options.runs {
                    for (which, best) in best.iter_mut().enumerate() {
                        if image == "over" {
                            self.prepare(
                                "qemu-img",
                                &["create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "over"],
                            )?;
                        }
                        let mut server = self.serve(which, image)?;
                        let mut load = self.command(0, "qemu-img");
                        // A step that is prime to the size visits the disk in no order.
                        load.args([
                            "bench", "-f", "raw", "-t", "none", "-c", &requests, "-d", "32", "-s", "4096",
                        ])
                        .args(["-S", "393687040"]);
                        if !flag.is_empty() {
                            load.arg(flag);
                        }
                        let output =
                            load.arg(format!("nbd+unix:///?socket={}/socket", self.dir.display())).output();
                        server.kill()?;
                        server.wait()?;
                        let output = output?;
                        let said = String::from_utf8_lossy(&output.stdout);
                        let took = said.lines().find_map(|l| {
                            l.strip_prefix("Run completed in ")?.split(' ').next()?.parse::<f64>().ok()
                        });
                        let Some(took) = took.filter(|_| output.status.success()) else {
                            bail!("qemu-img bench: {said}{}", String::from_utf8_lossy(&output.stderr));
                        };
                        *best = best.min(took);
                    }
                }
                let iops = |took: f64| self.options.requests as f64 / took;
                let name = format!("nbd random 4k {verb}, depth 32, qcow2{what}");
                let [theirs, ours] = best;
                let shown = |t: f64| format!("{:.0} IOPS", iops(t));
                self.print(&name, &shown(theirs), &shown(ours), theirs / ours, 1.3, "");
            }
        }
        Ok(())
    }
}

fn seconds(usage: &Usage) -> String {
    format!("{:.3} s (cpu {:.3})", usage.wall.as_secs_f64(), usage.cpu.as_secs_f64())
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let kvasir = match &options.kvasir {
        Some(program) => program.clone(),
        None => lab::build_kvasir()?,
    };
    let theirs = match &options.qemu {
        Some(dir) => dir.clone(),
        None => qemu::tools()?,
    };
    let dir = options.directory.join(format!("kvasir-bench-image-{}", std::process::id()));
    let ours = dir.join("bin");
    std::fs::create_dir_all(&ours).with_context(|| ours.display().to_string())?;
    for name in ["qemu-img", "qemu-nbd", "qemu-io"] {
        std::os::unix::fs::symlink(kvasir.canonicalize()?, ours.join(name))?;
    }
    let bench = Bench { options, tools: [theirs, ours], dir: dir.clone() };
    let version = bench.command(0, "qemu-img").arg("--version").output()?;
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    println!("| what | {version} | Kvasir | times as fast | peak memory (theirs / ours) |");
    println!("| --- | ---: | ---: | ---: | --- |");
    let result = bench.metadata().and_then(|()| bench.conversions()).and_then(|()| bench.nbd());
    std::fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    result.map(|()| ExitCode::SUCCESS)
}
