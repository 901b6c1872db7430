//! `serve`, and the same as `qemu-nbd`: exporting an image over NBD.

use super::{Context, Outcome, attach, convert};
use crate::{
    args::{self, Source},
    objects, overlay, signals,
};
use block::{
    Error, Image, OpenOptions, Options, Result, formats,
    nbd::{self, Export, NbdAddress, Server, Socket, TlsClient},
};
use clap::{CommandFactory, FromArgMatches, Parser};
use std::{
    ffi::OsString,
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

/// Tells a background server to report on standard output when it listens.
const READY: &str = "KVASIR_SERVE_READY";

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Format.
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Unix socket to listen on.
    #[arg(short = 'k', long, value_name = "PATH")]
    socket: Option<String>,
    /// Port to listen on.
    #[arg(short, long, default_value_t = 10809)]
    port: u16,
    /// Address to listen on.
    #[arg(short, long, default_value = "0.0.0.0")]
    bind: String,
    /// Name of the export.
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    export_name: String,
    /// Description of the export.
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    description: String,
    /// Refuse writes.
    #[arg(short, long)]
    read_only: bool,
    /// Clients at a time; 0 is no limit.
    #[arg(short = 'e', long, value_name = "N")]
    shared: Option<usize>,
    /// Go on when the last client has left.
    #[arg(short = 't', long)]
    persistent: bool,
    /// Export an internal snapshot's contents, read-only.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    load_snapshot: Option<String>,
    /// Offset of the exported part, in bytes.
    #[arg(short, long, value_name = "OFFSET")]
    offset: Option<String>,
    /// Offer a dirty bitmap.
    #[arg(short = 'B', long, value_name = "NAME")]
    bitmap: Vec<String>,
    /// Offer how deep in the backing chain data is.
    #[arg(short = 'A', long)]
    allocation_depth: bool,
    /// Cache mode.
    #[arg(long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// Bypass the host's cache.
    #[arg(short = 'n', long)]
    nocache: bool,
    /// What discards do: ignore, unmap.
    #[arg(long, value_name = "DISCARD", default_value = "unmap")]
    discard: String,
    /// What to do with zeros written: off, on, unmap.
    #[arg(long, value_name = "DETECT", default_value = "off")]
    detect_zeroes: String,
    /// Serve in the background, once listening.
    #[arg(long)]
    fork: bool,
    /// Write the process's number to a file.
    #[arg(long, value_name = "PATH")]
    pid_file: Option<String>,
    /// Say more.
    #[arg(short, long)]
    verbose: bool,
    /// Attach the image to a device of the kernel's NBD client, such as /dev/nbd0 (as root).
    #[arg(short = 'c', long, value_name = "DEV", conflicts_with_all = ["socket", "port", "bind", "fork"])]
    connect: Option<String>,
    /// Detach a device of the kernel's NBD client.
    #[arg(short = 'd', long)]
    disconnect: bool,
    /// List what another server exports.
    #[arg(short = 'L', long)]
    list: bool,
    /// TLS credentials of the listening side, the id of a tls-creds-x509 object.
    #[arg(long, value_name = "ID")]
    tls_creds: Option<String>,
    /// Name in the certificate of the server to list.
    #[arg(long, value_name = "HOSTNAME", requires = "list")]
    tls_hostname: Option<String>,
    /// Seconds a client may take to agree on an export; 0 is no limit.
    #[arg(long, value_name = "N", default_value_t = 10)]
    handshake_limit: u32,
    /// How requests reach the host: threads, native or io_uring.
    #[arg(long, value_name = "AIO", default_value = "threads")]
    aio: String,
    /// Keep the image as it is: writes go to a temporary file.
    #[arg(short, long)]
    snapshot: bool,
    /// Image (with -d: device).
    filename: Option<String>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> std::io::Result<Socket> {
        Ok(match self {
            Listener::Unix(l) => Socket::Unix(l.accept()?.0),
            Listener::Tcp(l) => Socket::Tcp(l.accept()?.0),
        })
    }
}

/// How many clients there are, and whether it is over.
#[derive(Default)]
struct State {
    clients: usize,
    over: bool,
}

/// Starts the same command in the background; returns when it listens.
fn fork() -> Result<()> {
    let failed = |e| Error::io("Could not start the server", e);
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    std::os::unix::process::CommandExt::arg0(&mut command, name);
    command.args(args.filter(|a| a != "--fork")).env(READY, "1");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let mut first = [0];
    let ready = match child.stdout.take() {
        Some(mut out) => matches!(out.read(&mut first), Ok(1)),
        None => false,
    };
    if ready { Ok(()) } else { Err(Error::usage("The server did not start; see its message above")) }
}

fn listen(a: &Args) -> Result<Listener> {
    Ok(match &a.socket {
        Some(path) => Listener::Unix(
            UnixListener::bind(path).map_err(|e| Error::io(format!("Failed to bind socket to {path}"), e))?,
        ),
        None => {
            let address = (a.bind.as_str(), a.port);
            let what = || format!("Failed to bind to {}:{}", a.bind, a.port);
            Listener::Tcp(TcpListener::bind(address).map_err(|e| Error::io(what(), e))?)
        }
    })
}

/// Prints what a server exports, as `qemu-nbd --list` does.
fn print_list(a: &Args) -> Result<()> {
    const FLAGS: [&str; 13] = [
        "", "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero",
        "block-status-payload",
    ];
    let mut address = NbdAddress {
        socket: a.socket.as_ref().map(Into::into),
        host: if a.bind == "0.0.0.0" { "localhost".into() } else { a.bind.clone() },
        port: a.port,
        ..Default::default()
    };
    if let Some(id) = &a.tls_creds {
        let objects = objects::parse(&a.source.object)?;
        let credentials = objects.credentials.get(id).cloned();
        let credentials =
            credentials.ok_or_else(|| Error::usage(format!("No TLS credentials with id '{id}'")))?;
        address.tls = Some(TlsClient { credentials, hostname: a.tls_hostname.clone() });
    }
    let exports = nbd::list(&address)?;
    println!("exports available: {}", exports.len());
    for e in exports {
        println!(" export: '{}'", e.name);
        if !e.description.is_empty() {
            println!("  description: {}", e.description);
        }
        if e.flags & 1 != 0 {
            println!("  size:  {}", e.size);
            let names: String = (1..FLAGS.len())
                .filter(|bit| e.flags >> bit & 1 != 0)
                .map(|bit| format!(" {}", FLAGS[bit]))
                .collect();
            println!("  flags: {:#x} ({names} )", e.flags);
        }
        if let Some([min, opt, max]) = e.block_sizes {
            println!("  min block: {min}\n  opt block: {opt}\n  max block: {max}");
        }
        println!("  transaction size: {}", if e.extended { "64-bit" } else { "32-bit" });
        if !e.contexts.is_empty() {
            println!("  available meta contexts: {}", e.contexts.len());
            e.contexts.iter().for_each(|c| println!("   {c}"));
        }
    }
    Ok(())
}

fn open(a: &Args) -> Result<Image> {
    let filename = a.filename.as_deref().ok_or_else(|| Error::usage("an image must be named"))?;
    let mut options = OpenOptions {
        read_only: a.read_only || a.load_snapshot.is_some(),
        cache: args::cache(Some(if a.nocache { "none" } else { &a.cache }), "writeback")?,
        discard: match a.discard.as_str() {
            "ignore" | "off" => false,
            "unmap" | "on" => true,
            other => return Err(Error::usage(format!("Invalid discard mode '{other}'"))),
        },
        detect_zeroes: block::parse_detect_zeroes(&a.detect_zeroes)?,
        ..Default::default()
    };
    if let Some(offset) = &a.offset {
        let offset = args::parse_size(offset, "offset")?;
        if a.format.as_deref().is_some_and(|f| f != "raw") {
            return Err(Error::usage("--offset is only available for raw images"));
        }
        let mut list = Options::new();
        list.set("offset", offset.to_string());
        options.options = list;
        return a.source.open(filename, Some("raw"), options);
    }
    if a.snapshot {
        if a.load_snapshot.is_some() {
            return Err(Error::usage("--snapshot and --load-snapshot cannot be used together"));
        }
        return overlay::open(&a.source, filename, a.format.as_deref(), options);
    }
    let image = a.source.open(filename, a.format.as_deref(), options)?;
    if let Some(which) = &a.load_snapshot {
        convert::view_snapshot(&image, which)?;
    }
    Ok(image)
}

fn bitmaps(image: &Image, names: &[String]) -> Result<Vec<(String, u64, Vec<u8>)>> {
    let mut out = Vec::new();
    for name in names {
        let missing = || Error::NotFound(format!("Bitmap '{name}' is not found"));
        let bitmaps = image.format().bitmaps().ok_or_else(missing)?;
        let info = bitmaps.list().into_iter().find(|b| b.name == *name).ok_or_else(missing)?;
        if info.auto && !image.is_read_only() {
            return Err(Error::usage(format!(
                "Enabled bitmap '{name}' incompatible with a writable export; disable it, or export read-only"
            )));
        }
        out.push((name.clone(), info.granularity, bitmaps.load(name)?));
    }
    Ok(out)
}

/// Serves until the last client has left, or for as long as the process lives.
fn serve(a: &Args, persistent: bool, limit: usize) -> Result<()> {
    signals::block();
    let image = Arc::new(open(a)?);
    let mut server = Server::new(vec![Export {
        bitmaps: bitmaps(&image, &a.bitmap)?,
        image: Arc::clone(&image),
        name: a.export_name.clone(),
        description: a.description.clone(),
        read_only: image.is_read_only(),
        multi_conn: limit != 1,
        allocation_depth: a.allocation_depth,
    }]);
    server.handshake_limit((a.handshake_limit > 0).then(|| Duration::from_secs(a.handshake_limit.into())));
    if let Some(id) = &a.tls_creds {
        let objects = objects::parse(&a.source.object)?;
        let credentials = objects.credentials.get(id);
        let credentials =
            credentials.ok_or_else(|| Error::usage(format!("No TLS credentials with id '{id}'")))?;
        server = server.with_tls(credentials.server()?);
    }
    let server = Arc::new(server);
    if let Some(device) = &a.connect {
        if a.tls_creds.is_some() {
            return Err(Error::usage("TLS is not supported with a host device"));
        }
        let name = a.filename.clone().unwrap_or_default();
        attach::serve(device, &server, || {
            println!("NBD device {device} is now connected to {name}");
            Ok(())
        })?;
        return image.close();
    }
    let listener = listen(a)?;
    if let Some(path) = &a.pid_file {
        std::fs::write(path, format!("{}\n", std::process::id())).map_err(|e| Error::io(path.clone(), e))?;
    }
    if std::env::var_os(READY).is_some() {
        // The parent waits for this byte; if it is gone, nobody does.
        let _ = std::io::stdout().write_all(b"\n").and_then(|()| std::io::stdout().flush());
        // Whoever reads the command's output must not wait for the server's end.
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        let null = null.map_err(|e| Error::io("/dev/null", e))?;
        rustix::stdio::dup2_stdout(&null).map_err(|e| Error::io("Could not leave standard output", e))?;
        rustix::stdio::dup2_stderr(&null).map_err(|e| Error::io("Could not leave standard error", e))?;
    }
    let state = Arc::new((Mutex::new(State::default()), Condvar::new()));
    let stop = Arc::clone(&state);
    std::thread::spawn(move || {
        signals::wait();
        stop.0.lock().unwrap_or_else(|e| e.into_inner()).over = true;
        stop.1.notify_all();
    });
    let verbose = a.verbose;
    let accepting = Arc::clone(&state);
    std::thread::spawn(move || {
        loop {
            {
                // A full house leaves newcomers in the socket's queue.
                let full = |s: &mut State| !s.over && limit > 0 && s.clients >= limit;
                let state = accepting.0.lock().unwrap_or_else(|e| e.into_inner());
                let state = accepting.1.wait_while(state, full).unwrap_or_else(|e| e.into_inner());
                if state.over {
                    return;
                }
            }
            let Ok(socket) = listener.accept() else { continue };
            accepting.0.lock().unwrap_or_else(|e| e.into_inner()).clients += 1;
            let (server, state) = (Arc::clone(&server), Arc::clone(&accepting));
            std::thread::spawn(move || {
                if let Err(e) = server.serve(socket)
                    && verbose
                {
                    eprintln!("client left: {e}");
                }
                let mut state_now = state.0.lock().unwrap_or_else(|e| e.into_inner());
                state_now.clients -= 1;
                if state_now.clients == 0 && !persistent {
                    state_now.over = true;
                }
                drop(state_now);
                state.1.notify_all();
            });
        }
    });
    let now = state.0.lock().unwrap_or_else(|e| e.into_inner());
    drop(state.1.wait_while(now, |s| !s.over).unwrap_or_else(|e| e.into_inner()));
    if let Some(path) = &a.socket {
        // Someone may have removed it already.
        let _ = std::fs::remove_file(path);
    }
    if let Some(path) = &a.pid_file {
        let _ = std::fs::remove_file(path);
    }
    image.close()
}

/// Does what the options ask for.
fn dispatch(a: &Args, persistent: bool, limit: usize) -> Result<()> {
    if !matches!(a.aio.as_str(), "threads" | "native" | "io_uring") {
        return Err(Error::usage(format!("Invalid aio mode '{}'", a.aio)));
    }
    if a.list {
        if a.filename.is_some() {
            return Err(Error::usage("List mode is incompatible with a file name"));
        }
        return print_list(a);
    }
    if a.disconnect {
        return match &a.filename {
            Some(device) => attach::disconnect(device),
            None => Err(Error::usage("name the device to detach, such as /dev/nbd0")),
        };
    }
    if a.fork { fork() } else { serve(a, persistent, limit) }
}

pub(crate) fn run(a: Args, _context: &Context) -> Outcome {
    Ok(dispatch(&a, true, a.shared.unwrap_or(0))?)
}

#[derive(Parser)]
#[command(about = "Export a disk image over NBD", disable_version_flag = true)]
struct Tool {
    /// Show the version.
    #[arg(short = 'V', long)]
    version: bool,
    #[command(flatten)]
    args: Args,
}

/// Runs `qemu-nbd`.
pub(crate) fn run_qemu_nbd(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    if args.iter().any(|a| a == "-V" || a == "--version") {
        println!("qemu-nbd version {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let parsed =
        Tool::command().name("qemu-nbd").try_get_matches_from(args).and_then(|m| Tool::from_arg_matches(&m));
    let tool = match parsed {
        Ok(tool) => tool,
        Err(e) => {
            // Printing help or a complaint can only fail when nobody reads it.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let a = tool.args;
    if a.format.as_deref().is_some_and(|f| formats::find(f).is_none()) {
        eprintln!("qemu-nbd: Unknown driver '{}'", a.format.unwrap_or_default());
        return ExitCode::FAILURE;
    }
    let result = dispatch(&a, a.persistent, a.shared.unwrap_or(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("qemu-nbd: {e}");
            ExitCode::FAILURE
        }
    }
}
