//! `kvasir create`: a virtual machine with a disk made from a distribution's packages, from an image, or empty.

use super::progress::Bar;
use super::store::{Description, Ssh, Store, Vm, cache};
use super::{keys, start};
use crate::{Failure, status};
use block::{Create, Image, OpenOptions, create_image, formats::Preallocation};
use guest::cloud::{self, Checksum};
use guest::debian::{self, Release};
use guest::seed::Seed;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

/// First host port that is tried for a guest's SSH.
const FIRST_PORT: u16 = 2222;
/// Name of the disk in a VM's directory.
const DISK: &str = "disk.qcow2";

/// Make a virtual machine and keep it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name; also the guest's host name, if that is not given
    #[arg(value_name = "VM")]
    name: String,
    /// What the disk is made from: debian[:12|:13] (from packages), or an image, as FILE or URL; none: an empty disk
    #[arg(long, value_name = "SOURCE")]
    from: Option<String>,
    /// ISO image in the CD-ROM drive
    #[arg(long, value_name = "FILE")]
    cdrom: Option<PathBuf>,
    /// Size of the disk (default: the image's, but at least 10G)
    #[arg(long, value_name = "SIZE")]
    disk_size: Option<String>,
    /// RAM
    #[arg(long, short, value_name = "SIZE[,...]", default_value = "1G")]
    memory: String,
    /// vCPUs
    #[arg(long, short = 'c', value_name = "N[,...]", default_value = "2")]
    cpus: String,
    /// bios or uefi
    #[arg(long, value_name = "KIND", default_value = "bios", value_parser = ["bios", "uefi"])]
    firmware: String,
    /// Host name of the guest
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// User of the guest (default: 'debian' for Debian, else 'user')
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Password of the user, for the console (default: one is made if no key is given, and shown)
    #[arg(long, value_name = "TEXT")]
    password: Option<String>,
    /// Public SSH key of the user, as text or FILE; without one, a pair is made
    #[arg(long, value_name = "KEY")]
    ssh_key: Vec<String>,
    /// cloud-init user data, for images that have cloud-init
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Checksum of what is fetched: sha256:HEX or sha512:HEX
    #[arg(long, value_name = "CHECKSUM", requires = "from")]
    checksum: Option<String>,
    /// Mirror to take Debian's packages from
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// More packages to install
    #[arg(long, value_name = "PACKAGE", value_delimiter = ',')]
    package: Vec<String>,
    /// More arguments of 'kvasir run' for every start
    #[arg(last = true, value_name = "ARGUMENTS")]
    more: Vec<String>,
}

impl Args {
    /// What `kvasir create NAME --from SOURCE` gives.
    pub(super) fn plain(name: &str, from: &str) -> Self {
        Self {
            name: name.into(),
            from: Some(from.into()),
            cdrom: None,
            disk_size: None,
            memory: "1G".into(),
            cpus: "2".into(),
            firmware: "bios".into(),
            hostname: None,
            user: None,
            password: None,
            ssh_key: Vec::new(),
            user_data: None,
            checksum: None,
            mirror: None,
            package: Vec::new(),
            more: Vec::new(),
        }
    }
}

pub(crate) fn main(args: &Args) -> Result<u8, Failure> {
    let vm = make(args)?;
    println!("'{}' is ready: kvasir start {}", vm.name, vm.name);
    if let Some(command) = vm.ssh_command() {
        println!("once it runs: {command}");
    }
    Ok(0)
}

impl From<guest::Error> for Failure {
    fn from(e: guest::Error) -> Self {
        let status = match e {
            guest::Error::Usage(_) | guest::Error::Missing { .. } => status::USAGE,
            _ => status::HOST,
        };
        Self { status, message: e.to_string() }
    }
}

/// Where a disk comes from.
enum Source {
    Debian(Release),
    Url(String),
    File(PathBuf),
    Empty,
}

fn source(args: &Args) -> Result<Source, Failure> {
    let Some(from) = &args.from else {
        return if args.cdrom.is_some() {
            Ok(Source::Empty)
        } else {
            Err(Failure::usage(
                "nothing to make it from: give --from (debian, an image or its URL) or --cdrom",
            ))
        };
    };
    if let Some(release) = Release::parse(from)? {
        return Ok(Source::Debian(release));
    }
    if cloud::is_url(from) {
        return Ok(Source::Url(from.clone()));
    }
    if let Some(scheme) = from.split_once("://") {
        return Err(Failure::usage(format!("--from {from}: use http or https instead of {}", scheme.0)));
    }
    Ok(Source::File(from.into()))
}

/// Makes the VM.
pub(super) fn make(args: &Args) -> Result<Vm, Failure> {
    let store = Store::open()?;
    super::store::check_name(&args.name)?;
    if store.dir_of(&args.name).exists() {
        return Err(Failure::usage(format!(
            "there is a VM '{}' already; 'kvasir rm {0}' removes it",
            args.name
        )));
    }
    let source = source(args)?;
    let is_debian = matches!(source, Source::Debian(_));
    check(args, is_debian)?;
    let wanted =
        args.disk_size.as_deref().map(|s| memory::parse_size(s, 'B')).transpose().map_err(Failure::usage)?;
    // Without a word from the user the console lets nobody in that did not see this.
    let made = if is_debian && args.password.is_none() && args.ssh_key.is_empty() {
        Some(password()?)
    } else {
        None
    };
    let mut seed = Seed {
        instance_id: format!("{}-{}", args.name, instance()),
        hostname: args.hostname.clone().unwrap_or_else(|| args.name.replace(['_', '.'], "-")),
        user: args.user.clone().unwrap_or_else(|| if is_debian { "debian" } else { "user" }.into()),
        password: args.password.clone().or_else(|| made.clone()),
        ssh_keys: Vec::new(),
        user_data: args
            .user_data
            .as_ref()
            .map(|p| {
                std::fs::read(p).map_err(|e| Failure::usage(format!("--user-data {}: {e}", p.display())))
            })
            .transpose()?,
    };
    seed.check()?;
    for text in &args.ssh_key {
        keys::given(text)?;
    }
    start::check_run(args.memory.as_str(), args.cpus.as_str(), &args.more)?;
    let cdrom = args
        .cdrom
        .as_ref()
        .map(|p| {
            std::fs::canonicalize(p).map_err(|e| Failure::usage(format!("--cdrom {}: {e}", p.display())))
        })
        .transpose()?;
    let port = free_port(&store)?;

    let base = fetch(args, &source)?;
    store.add(&args.name, |dir| {
        make_disk(&dir.join(DISK), base.as_deref(), wanted)?;
        let mut description = Description {
            from: args.from.clone().unwrap_or_else(|| "nothing".into()),
            memory: args.memory.clone(),
            cpus: args.cpus.clone(),
            firmware: args.firmware.clone(),
            disk: Some(DISK.into()),
            seed: None,
            cdrom,
            ssh: None,
            arguments: args.more.clone(),
        };
        if base.is_some() {
            let keys = keys::choose(&args.ssh_key, dir)?;
            seed.ssh_keys = keys.public;
            seed.write(&dir.join("seed.img"))?;
            description.seed = Some("seed.img".into());
            description.ssh = Some(Ssh { port, user: seed.user.clone(), key: keys.private, password: made });
        }
        Ok(description)
    })
}

/// Refuses what would have no effect.
fn check(args: &Args, is_debian: bool) -> Result<(), Failure> {
    if !is_debian && (args.mirror.is_some() || !args.package.is_empty()) {
        return Err(Failure::usage(
            "--mirror and --package are for disks made from packages: use --from debian",
        ));
    }
    if is_debian && args.user_data.is_some() {
        return Err(Failure::usage(
            "--user-data needs a guest with cloud-init, which a disk made from packages has not: use a cloud image, or --hostname, --user, --ssh-key",
        ));
    }
    if args.checksum.is_some() && !args.from.as_deref().is_some_and(cloud::is_url) {
        return Err(Failure::usage("--checksum is for what is fetched: --from must be a URL"));
    }
    let guest_options = args.hostname.is_some()
        || args.user.is_some()
        || args.password.is_some()
        || !args.ssh_key.is_empty()
        || args.user_data.is_some();
    if args.from.is_none() && guest_options {
        return Err(Failure::usage(
            "--hostname, --user, --password, --ssh-key and --user-data are for a disk that has a system on it: give --from",
        ));
    }
    Ok(())
}

/// The image that the disk is a copy of.
fn fetch(args: &Args, source: &Source) -> Result<Option<PathBuf>, Failure> {
    match source {
        Source::Empty => Ok(None),
        Source::File(path) => {
            if !path.is_file() {
                return Err(Failure::usage(format!(
                    "--from {}: there is no such file; for a distribution use debian",
                    path.display()
                )));
            }
            Ok(Some(path.clone()))
        }
        Source::Debian(release) => {
            let options = debian::Options { mirror: args.mirror.clone(), packages: args.package.clone() };
            eprintln!(
                "kvasir: the first disk of Debian {} ({}) takes a few minutes to make, and is kept for the next ones",
                release.version, release.suite
            );
            Ok(Some(debian::disk(release, &options, &cache()?, &mut Bar::new())?))
        }
        Source::Url(url) => {
            let checksum = args.checksum.as_deref().map(Checksum::parse).transpose()?;
            let (path, checked) = cloud::fetch(url, checksum.as_ref(), &cache()?, &mut Bar::new())?;
            if !checked {
                eprintln!(
                    "kvasir: warning: there is no checksum to compare {url} with; give one with --checksum"
                );
            }
            Ok(Some(path))
        }
    }
}

fn make_disk(path: &Path, base: Option<&Path>, wanted: Option<u64>) -> Result<(), Failure> {
    const DEFAULT: u64 = 10 << 30;
    let text = |p: &Path| {
        p.to_str().map(str::to_owned).ok_or_else(|| Failure::usage(format!("{}: not UTF-8", p.display())))
    };
    let fail =
        |e: block::Error| Failure { status: status::HOST, message: format!("{}: {e}", path.display()) };
    let name = text(path)?;
    let Some(base) = base else {
        let create = Create {
            size: Some(wanted.unwrap_or(DEFAULT)),
            name,
            format: "qcow2".into(),
            ..Create::default()
        };
        return create_image(&create).map(drop).map_err(fail);
    };
    let from = text(base)?;
    let opened = Image::open(&from, &OpenOptions::reader(None))
        .map_err(|e| Failure::usage(format!("--from {from}: {e}")))?;
    let size = opened.size();
    let plain = opened.driver().name == "qcow2" && opened.backing().is_none();
    drop(opened);
    if let Some(wanted) = wanted.filter(|w| *w < size) {
        return Err(Failure::usage(format!("--disk-size {wanted} is smaller than the image, {size} bytes")));
    }
    if plain {
        std::fs::copy(base, path)
            .map_err(|e| Failure { status: status::HOST, message: format!("{}: {e}", path.display()) })?;
    } else {
        let args = ["convert", "-O", "qcow2", from.as_str(), name.as_str()].map(Into::into);
        let tool = std::iter::once("kvasir image".into()).chain(args);
        if image::main(tool, image::Personality::Kvasir) != std::process::ExitCode::SUCCESS {
            return Err(Failure { status: status::HOST, message: format!("cannot copy {from}") });
        }
    }
    let size_then = wanted.unwrap_or_else(|| size.max(DEFAULT));
    if size_then > size {
        let image = Image::open(&name, &OpenOptions::writer(Some("qcow2"))).map_err(fail)?;
        image.resize(size_then, Preallocation::Off).map_err(fail)?;
        image.close().map_err(fail)?;
    }
    Ok(())
}

/// A password that can be read out and typed: 12 of 32 characters, 60 bits.
fn password() -> Result<String, Failure> {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 12];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Failure { status: status::HOST, message: format!("no random numbers: {e}") })?;
    Ok(bytes.iter().map(|b| char::from(LETTERS[usize::from(b % 32)])).collect())
}

/// A number that tells this VM from an earlier one of the same name.
fn instance() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|d| d.as_nanos() as u64).unwrap_or_default()
}

/// A port of the host's loopback that nothing listens on and no other VM is promised.
fn free_port(store: &Store) -> Result<u16, Failure> {
    let taken: Vec<u16> =
        store.all()?.iter().filter_map(|vm| Some(vm.description.ssh.as_ref()?.port)).collect();
    (FIRST_PORT..FIRST_PORT + 1000)
        .find(|p| !taken.contains(p) && TcpListener::bind(("127.0.0.1", *p)).is_ok())
        .ok_or_else(|| Failure::usage(format!("no port from {FIRST_PORT} on is free for SSH into the guest")))
}
