//! The stress guest: programs of `lab/stress` that are hard on a processor, and this machine's C compiler, whose object files
//! must come out the same inside.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::lab::{self, programs};
use crate::{cpio, guest, paths};

/// What the compiler compiles: real programs of the tree.
const COMPILED: &[&str] = &["lab/speed/calls.c", "lab/speed/memory.c", "lab/stress/stress.c"];
/// Options that make code independent of the processor that compiles.
const CODE: &[&str] = &["-quiet", "-fpreprocessed", "-O2", "-mtune=generic", "-march=x86-64"];

#[derive(clap::Args)]
pub struct Options {
    /// How many times longer than the short run
    #[arg(long, default_value_t = 1)]
    scale: u32,
    /// Only one program: patch, forks, maps, vectors, clocks, faults or compile
    #[arg(long)]
    only: Option<String>,
    /// vCPUs
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Accelerator and its options
    #[arg(long, default_value = "soft")]
    accel: String,
    /// The kvasir program, instead of building one
    #[arg(long, value_name = "FILE")]
    kvasir: Option<PathBuf>,
}

/// A prepared stress guest.
pub struct Stress {
    directory: PathBuf,
}

impl Stress {
    fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs.cpio")
    }

    /// One line for each object file that the guest has to print.
    fn expected(&self) -> PathBuf {
        self.directory.join("expected")
    }
}

pub fn task(options: &Options) -> Result<ExitCode> {
    let guest = guest::prepare(false)?;
    let stress = prepare(&guest)?;
    let program = match &options.kvasir {
        Some(path) => path.canonicalize().with_context(|| path.display().to_string())?,
        None => lab::build_kvasir()?,
    };
    let mut append =
        format!("console=ttyS0 quiet panic=-1 rdinit=/stress/init stress.scale={}", options.scale);
    if let Some(only) = &options.only {
        append += &format!(" stress.only={only}");
    }
    let output = Command::new(program)
        .args(["run", "--accel", &options.accel, "--cpus", &options.cpus.to_string(), "--memory", "1G"])
        .args(["--no-reboot", "--append", &append])
        .arg("--kernel")
        .arg(guest.vmlinux())
        .arg("--initrd")
        .arg(stress.initramfs())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run kvasir")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    ensure!(text.contains("STRESS-DONE"), "the guest did not finish");
    ensure!(!text.contains("STRESS-FAILED") && !text.contains("STRESS-WRONG"), "something went wrong");
    if options.only.as_deref().is_none_or(|only| only == "compile") {
        for line in std::fs::read_to_string(stress.expected())?.lines() {
            ensure!(text.contains(line), "the guest's compiler made another file: expected {line}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds what is missing or old.
pub fn prepare(guest: &guest::Guest) -> Result<Stress> {
    let _lock = paths::lock_cache()?;
    let stress = Stress { directory: paths::cache()?.join("stress") };
    std::fs::create_dir_all(&stress.directory).with_context(|| stress.directory.display().to_string())?;
    let base = std::fs::read(guest.initramfs())?;
    let compiler = program("cc1")?;
    let assembler = program("as")?;
    let stamp = stress.directory.join("stamp");
    let want = stamp_of(&base, &[&compiler, &assembler])?;
    let current = std::fs::read_to_string(&stamp).is_ok_and(|have| have == want);
    if current && stress.initramfs().is_file() && stress.expected().is_file() {
        return Ok(stress);
    }
    eprintln!("xtask: preparing the stress guest");
    let work = stress.directory.join("work");
    std::fs::create_dir_all(&work)?;
    let lab = paths::workspace().join("lab/stress");
    let program = work.join("stress");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-pthread", "-Wall", "-Wextra", "-s", "-o"]).arg(&program);
    run(gcc.arg(lab.join("stress.c")))?;

    let mut archive = cpio::Archive::new();
    archive.copy(&lab.join("init"), "/stress/init")?;
    archive.copy(&program, "/stress/stress")?;
    programs::add(&mut archive, &compiler, "/stress/cc1")?;
    programs::add(&mut archive, &assembler, "/stress/as")?;
    let mut expected = String::new();
    for source in COMPILED {
        let source = paths::workspace().join(source);
        let name = source.file_stem().context("no name")?.to_string_lossy().into_owned();
        let file = |extension: &str| work.join(format!("{name}.{extension}"));
        run(Command::new("gcc").args(["-E", "-P", "-o"]).arg(file("i")).arg(&source))?;
        run(Command::new(&compiler).args(CODE).arg(file("i")).arg("-o").arg(file("s")))?;
        run(Command::new(&assembler).arg("-o").arg(file("o")).arg(file("s")))?;
        let sum = Command::new("md5sum").arg(file("o")).output().context("md5sum: cannot run")?;
        let sum = String::from_utf8_lossy(&sum.stdout);
        let sum = sum.split_whitespace().next().context("md5sum: no sum")?;
        expected += &format!("STRESS-OBJECT {name} {sum}\n");
        archive.copy(&file("i"), &format!("/stress/{name}.i"))?;
    }
    paths::write_atomically(&stress.initramfs(), &[base, archive.finish()?].concat())?;
    paths::write_atomically(&stress.expected(), expected.as_bytes())?;
    std::fs::remove_dir_all(&work)?;
    paths::write_atomically(&stamp, want.as_bytes())?;
    Ok(stress)
}

fn run(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("cannot run {command:?}; install gcc and libc6-dev"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// A part of the C compiler.
fn program(name: &str) -> Result<PathBuf> {
    let output = Command::new("gcc").arg(format!("-print-prog-name={name}")).output();
    let output = output.context("gcc: cannot run; install it")?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if path.is_absolute() {
        return Ok(path);
    }
    // The compiler leaves what it does not have itself to PATH.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name}: not there; install gcc"))
}

fn stamp_of(base: &[u8], compilers: &[&Path]) -> Result<String> {
    let mut text = format!(
        "base {:016x}\nself {:016x}\n",
        guest::fnv1a(base),
        guest::fnv1a(include_bytes!("stress.rs"))
    );
    for compiler in compilers {
        let size = std::fs::metadata(compiler).with_context(|| compiler.display().to_string())?.len();
        text += &format!("{} {size}\n", compiler.display());
    }
    for source in COMPILED.iter().chain(&["lab/stress/init", "lab/speed/speed.h"]) {
        let path = paths::workspace().join(source);
        let data = std::fs::read(&path).with_context(|| path.display().to_string())?;
        text += &format!("{source} {:016x}\n", guest::fnv1a(&data));
    }
    Ok(text)
}
