//! The program under QEMU's name: command line, QMP, the human monitor, with real clients where there are any.
#![allow(clippy::unwrap_used)] // a test that cannot set itself up may panic

mod common;

use common::{READY, Run, guest};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// `qemu-system-x86_64 ARGS`, by the subcommand.
fn qemu(args: &[&str]) -> Command {
    let mut all = vec!["qemu"];
    all.extend(args);
    common::kvasir(&all)
}

fn finish(args: &[&str]) -> common::Finished {
    Run::start(qemu(args), Duration::from_secs(60)).finish()
}

/// A machine with a QMP socket.
struct Machine {
    child: Child,
    dir: tempfile::TempDir,
    input: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Machine {
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        let mut all = vec!["-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", &monitor];
        all.extend(args);
        let mut command = qemu(&all);
        command.stdout(Stdio::null()).stderr(Stdio::inherit());
        let child = command.spawn().unwrap();
        let input = BufReader::new(connect(&socket));
        let mut machine = Self { child, dir, input, events: Vec::new() };
        assert_eq!(machine.read()["QMP"]["version"]["qemu"]["major"], 7);
        machine
    }

    /// Started, with its negotiation done.
    fn ready(args: &[&str]) -> Self {
        let mut machine = Self::start(args);
        machine.run("qmp_capabilities", json!({}));
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn send(&mut self, text: &str) {
        self.input.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.input.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    /// The answer to what was sent; events are kept.
    fn answer(&mut self) -> Value {
        loop {
            let value = self.read();
            if value.get("event").is_none() {
                return value;
            }
            self.events.push(value);
        }
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.send(&format!("{}\n", json!({ "execute": command, "arguments": arguments })));
        self.answer()
    }

    fn run(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.ask(command, arguments);
        answer.get("return").cloned().unwrap_or_else(|| panic!("{command}: {answer}"))
    }

    fn error(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.ask(command, arguments);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    }

    fn hmp(&mut self, line: &str) -> String {
        let text = self.run("human-monitor-command", json!({ "command-line": line }));
        text.as_str().unwrap().replace("\r\n", "\n")
    }

    fn wait_event(&mut self, name: &str) -> Value {
        loop {
            if let Some(i) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(i);
            }
            let value = self.read();
            assert!(value.get("event").is_some(), "{value} while waiting for {name}");
            self.events.push(value);
        }
    }

    fn wait_end(mut self) -> Option<i32> {
        let status = self.child.wait().unwrap();
        status.code()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(path: &Path) -> UnixStream {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
                return stream;
            }
            Err(e) => assert!(Instant::now() < until, "no monitor at {}: {e}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

const NONE: [&str; 2] = ["-machine", "none"];

#[test]
fn help_and_version() {
    let version = finish(&["-version"]);
    assert!(version.stdout.starts_with("QEMU emulator version 7.2."), "{}", version.stdout);
    for (args, words) in [
        (&["-machine", "help"][..], &["q35", "pc-q35-7.2", "microvm", "none"][..]),
        (&["-device", "help"], &["name \"virtio-blk-pci\", bus PCI", "isa-debug-exit"]),
        (&["-device", "virtio-rng-pci,help"], &["addr=<str>", "packed=<bool>"]),
        (&["-accel", "help"], &["kvm\ntcg\n"]),
        (&["-cpu", "help"], &["qemu64", "max"]),
        (&["-chardev", "help"], &["socket", "pty", "ringbuf"]),
        (&["-object", "memory-backend-file,help"], &["mem-path=<str>"]),
        (&["-h"], &["-netdev", "-blockdev"]),
    ] {
        let end = finish(args);
        assert_eq!(end.status, Some(0), "{args:?}: {}", end.stderr);
        for word in words {
            assert!(end.stdout.contains(word), "{args:?}: no {word} in {}", end.stdout);
        }
    }
}

#[test]
fn mistakes_on_the_command_line() {
    for (args, words) in [
        (&["-machin", "q35"][..], &["-machin", "did you mean '-machine'"][..]),
        (&["-machine", "q53"], &["q53", "did you mean 'q35'"]),
        (&["-machine", "q35,hpt=off"], &["hpt", "hpet"]),
        (&["-smp", "0"], &["-smp", "greater than zero"]),
        (&["-m", "lots"], &["-m", "lots"]),
        (&["-m"], &["requires an argument"]),
        (&["-spice", "port=1"], &["-spice: not supported", "-vnc"]),
        (&["-device", "virtio-bkl-pci", "-S"], &["virtio-blk-pci"]),
        (&["-chardev", "sokcet,id=a"], &["sokcet", "socket"]),
        (&["-chardev", "null"], &["id"]),
        (&["-mon", "chardev=nope"], &["nope", "not found"]),
        (&["-serial", "tcp:80"], &["HOST:PORT"]),
        (&["-drive", "file=/nonexistent,if=virtio"], &["/nonexistent"]),
        (&["-drive", "file=/dev/null,if=vritio"], &["vritio"]),
        (&["-drive", "file=/dev/null,foo=1"], &["foo"]),
        (&["-append", "x"], &["-kernel"]),
        (&["-object", "secret,id=s"], &["file", "data"]),
        (&["-uuid", "1"], &["UUID"]),
        (&["-global", "x"], &["DRIVER.PROPERTY=VALUE"]),
        (&["-rtc", "clock=moon"], &["moon"]),
        (&["-readconfig", "/nonexistent"], &["/nonexistent"]),
    ] {
        let mut all = vec!["-nodefaults", "-display", "none", "-accel", "tcg"];
        all.extend(args);
        let end = finish(&all);
        assert_eq!(end.status, Some(1), "{args:?}: {}", end.stderr);
        for word in words {
            assert!(end.stderr.contains(word), "{args:?}: no {word} in {}", end.stderr);
        }
    }
}

#[test]
fn daemon_with_pid_file() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, pid) = (dir.path().join("qmp"), dir.path().join("pid"));
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let end = finish(&[
        "-S",
        "-no-user-config",
        "-nodefaults",
        "-nographic",
        "-machine",
        "none,accel=kvm:tcg",
        "-qmp",
        &monitor,
        "-pidfile",
        pid.to_str().unwrap(),
        "-daemonize",
    ]);
    assert_eq!(end.status, Some(0), "{}", end.stderr);
    let number = std::fs::read_to_string(&pid).unwrap();
    assert!(Path::new("/proc").join(number.trim()).exists());
    let mut stream = connect(&socket);
    stream.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}").unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert!(all.contains("SHUTDOWN") && all.contains("host-qmp-quit"), "{all}");
    let until = Instant::now() + Duration::from_secs(20);
    while pid.exists() || socket.exists() {
        assert!(Instant::now() < until, "the pid file or the socket stays");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn protocol() {
    let mut m = Machine::start(&NONE);
    m.send("{\"execute\":\"query-status\",\"id\":1}");
    let early = m.read();
    assert_eq!((&early["error"]["class"], &early["id"]), (&json!("CommandNotFound"), &json!(1)));
    m.run("qmp_capabilities", json!({}));
    for (text, class, word) in [
        ("[1]", "GenericError", "must be a JSON object"),
        ("{}", "GenericError", "lacks member 'execute'"),
        ("{\"execute\":1}", "GenericError", "must be a string"),
        ("{\"execute\":\"stop\",\"arguments\":1}", "GenericError", "must be an object"),
        ("{\"execute\":\"stop\",\"x\":1}", "GenericError", "'x' is unexpected"),
        ("{\"exec-oob\":\"stop\"}", "GenericError", "'exec-oob' is unexpected"),
        ("{\"execute\":\"nope\"}", "CommandNotFound", "nope"),
        ("{\"execute\":\"stop\",\"arguments\":{\"a\":1}}", "GenericError", "Parameter 'a' is unexpected"),
        ("{\"execute\":\"qom-get\",\"arguments\":{\"path\":\"/\"}}", "GenericError", "'property' is missing"),
        ("{\"execute\":\"getfd\",\"arguments\":{\"fdname\":7}}", "GenericError", "expected: string"),
        ("{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"a\"}}", "GenericError", "SCM_RIGHTS"),
        (
            "{\"execute\":\"set-action\",\"arguments\":{\"reboot\":\"b\"}}",
            "GenericError",
            "does not accept value 'b'",
        ),
        ("{\"a\" 1}", "GenericError", "JSON parse error"),
    ] {
        m.send(text);
        let answer = m.answer();
        assert_eq!(answer["error"]["class"], class, "{text}: {answer}");
        assert!(answer["error"]["desc"].as_str().unwrap().contains(word), "{text}: {answer}");
    }
    // Deep nesting, an id of any type, two commands without a separator.
    m.send(&format!("{}\n", "[".repeat(5000)));
    assert!(m.answer()["error"]["desc"].as_str().unwrap().contains("nesting depth"));
    m.send(
        "{\"execute\":\"query-status\",\"id\":{\"x\":[null]}}{\"execute\":\"query-version\",\"id\":\"b\"}",
    );
    assert_eq!(m.answer()["id"], json!({ "x": [null] }));
    assert_eq!(m.answer()["id"], "b");
}

#[test]
fn out_of_band() {
    let mut m = Machine::start(&["-machine", "none", "-S"]);
    m.run("qmp_capabilities", json!({ "enable": ["oob"] }));
    m.send("{\"exec-oob\":\"query-status\",\"id\":1}");
    assert!(m.answer()["error"]["desc"].as_str().unwrap().contains("does not support OOB"));
    m.send("{\"execute\":\"query-status\",\"id\":2}");
    assert_eq!(m.answer()["return"]["status"], "prelaunch");
    m.send("{\"exec-oob\":\"quit\",\"id\":3}");
    assert_eq!(m.answer()["id"], 3);
}

/// Every command that needs no arguments answers in the shape that introspection promises.
#[test]
fn answers_match_the_schema() {
    let mut m = Machine::ready(&[
        "-machine",
        "q35",
        "-S",
        "-kernel",
        guest_or_skip(),
        "-device",
        "virtio-rng-pci,id=r",
    ]);
    let schema = m.run("query-qmp-schema", json!({}));
    let types: std::collections::HashMap<String, Value> = schema
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                format!(
                    "{}{}",
                    if e["meta-type"] == "command" { "!" } else { "" },
                    e["name"].as_str().unwrap()
                ),
                e.clone(),
            )
        })
        .collect();
    let mut checked = 0;
    for entry in schema.as_array().unwrap().iter().filter(|e| e["meta-type"] == "command") {
        let name = entry["name"].as_str().unwrap();
        let arguments = &types[entry["arg-type"].as_str().unwrap()];
        let optional = arguments["members"].as_array().unwrap().iter().all(|m| m.get("default").is_some());
        if !optional || !name.starts_with("query-") {
            continue;
        }
        let answer = m.ask(name, json!({}));
        match answer.get("return") {
            Some(value) => fits(value, entry["ret-type"].as_str().unwrap(), &types, name),
            None => assert!(answer["error"]["desc"].is_string(), "{name}: {answer}"),
        }
        checked += 1;
    }
    assert!(checked > 25, "{checked}");
    let commands = m.run("query-commands", json!({}));
    for c in commands.as_array().unwrap() {
        assert!(types.contains_key(&format!("!{}", c["name"].as_str().unwrap())));
    }
}

/// A kernel that is not run; any file that loads will do.
fn guest_or_skip() -> &'static str {
    static KERNEL: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    KERNEL.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("kvasir-test-kernel-{}", std::process::id()));
        std::fs::write(&path, tiny_kernel()).unwrap();
        path.to_str().unwrap().into()
    })
}

/// An ELF64 kernel whose only instructions are `hlt; jmp` to it, loaded at 1 MiB.
fn tiny_kernel() -> Vec<u8> {
    kernel_with(&[0xf4, 0xeb, 0xfd])
}

/// An ELF64 kernel with this code at 1 MiB, where it is entered.
fn kernel_with(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; 0x1000];
    elf[..16].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf[16..20].copy_from_slice(&[2, 0, 62, 0]);
    elf[20] = 1;
    elf[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
    elf[32..40].copy_from_slice(&64u64.to_le_bytes());
    elf[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    let header = &mut elf[64..120];
    header[0] = 1;
    header[4] = 5;
    header[8..16].copy_from_slice(&0x200u64.to_le_bytes());
    header[16..24].copy_from_slice(&0x10_0000u64.to_le_bytes());
    header[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
    header[32..40].copy_from_slice(&0x100u64.to_le_bytes());
    header[40..48].copy_from_slice(&0x100u64.to_le_bytes());
    elf[0x200..0x200 + code.len()].copy_from_slice(code);
    elf
}

fn fits(value: &Value, name: &str, types: &std::collections::HashMap<String, Value>, at: &str) {
    let t = &types[name];
    match t["meta-type"].as_str().unwrap() {
        "builtin" => {
            let good = match t["json-type"].as_str().unwrap() {
                "string" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "number" => value.is_number(),
                "boolean" => value.is_boolean(),
                "null" => value.is_null(),
                _ => true,
            };
            assert!(good, "{at}: {value} is no {}", t["json-type"]);
        }
        "enum" => assert!(
            t["values"].as_array().unwrap().contains(value),
            "{at}: {value} is not in {}",
            t["values"]
        ),
        "array" => {
            for (i, v) in
                value.as_array().unwrap_or_else(|| panic!("{at}: {value} is no list")).iter().enumerate()
            {
                fits(v, t["element-type"].as_str().unwrap(), types, &format!("{at}[{i}]"));
            }
        }
        "object" if t.get("variants").is_none() => {
            let object = value.as_object().unwrap_or_else(|| panic!("{at}: {value} is no object"));
            let members = t["members"].as_array().unwrap();
            for (key, v) in object {
                let member = members.iter().find(|m| m["name"] == key.as_str());
                let member = member.unwrap_or_else(|| panic!("{at}: '{key}' is not in the schema"));
                fits(v, member["type"].as_str().unwrap(), types, &format!("{at}.{key}"));
            }
            for m in members.iter().filter(|m| m.get("default").is_none()) {
                assert!(object.contains_key(m["name"].as_str().unwrap()), "{at}: '{}' is missing", m["name"]);
            }
        }
        _ => {}
    }
}

#[test]
fn run_states_and_events() {
    let kernel = guest_or_skip();
    let mut m = Machine::ready(&[
        "-machine",
        "q35",
        "-S",
        "-m",
        "64",
        "-smp",
        "2",
        "-kernel",
        kernel,
        "-no-shutdown",
        "-name",
        "guest=t",
    ]);
    assert_eq!(m.run("query-status", json!({}))["status"], "prelaunch");
    assert_eq!(m.run("query-name", json!({}))["name"], "t");
    m.run("cont", json!({}));
    m.wait_event("RESUME");
    let cpus = m.run("query-cpus-fast", json!({}));
    assert_eq!(cpus.as_array().unwrap().len(), 2);
    m.run("stop", json!({}));
    let stop = m.wait_event("STOP");
    assert!(stop["timestamp"]["seconds"].as_u64().unwrap() > 1_500_000_000);
    assert_eq!(m.run("query-status", json!({}))["status"], "paused");
    let registers = m.hmp("info registers");
    assert!(registers.contains("CPU#0\nRAX=") && registers.contains("RIP=0000000000100"), "{registers}");
    assert!(m.hmp("x/2i 0x100000").contains("hlt"), "{}", m.hmp("x/2i 0x100000"));
    assert_eq!(m.hmp("xp/2xb 0x100000"), "0000000000100000: 0xf4 0xeb\n");
    assert_eq!(m.hmp("print $rip & 0xfff00000"), "1048576\n");
    assert_eq!(m.hmp("gva2gpa 0x100010"), "gpa: 0x100010\n");
    assert_eq!(m.hmp("info status"), "VM status: paused\n");
    assert!(m.hmp("info pci").contains("Host bridge: PCI device 8086:29c0"));
    assert!(m.hmp("info mtree").contains("pc.ram"));
    assert!(m.hmp("info cpus").contains("* CPU #0: thread_id="));
    assert!(m.hmp("fnord").contains("unknown command: 'fnord'"));
    let dump = m.path("dump");
    m.run("pmemsave", json!({ "val": 0x10_0000, "size": 3, "filename": dump }));
    assert_eq!(std::fs::read(&dump).unwrap(), [0xf4, 0xeb, 0xfd]);
    m.run("inject-nmi", json!({}));
    m.run("system_reset", json!({}));
    let reset = m.wait_event("RESET");
    assert_eq!(reset["data"], json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    assert_eq!(m.run("query-status", json!({}))["status"], "prelaunch");
    m.run("set-action", json!({ "reboot": "shutdown" }));
    m.run("system_reset", json!({}));
    let shutdown = m.wait_event("SHUTDOWN");
    assert_eq!(shutdown["data"]["reason"], "host-qmp-system-reset");
    assert_eq!(m.run("query-status", json!({}))["status"], "shutdown");
    assert!(m.error("cont", json!({})).contains("Resetting the Virtual Machine is required"));
    m.run("quit", json!({}));
    assert_eq!(m.wait_end(), Some(0));
}

#[test]
fn monitors_that_never_read_hold_up_nobody() {
    let mut m = Machine::ready(&["-machine", "none", "-chardev", "null,id=x"]);
    let second = m.path("second");
    m.run(
        "chardev-add",
        json!({ "id": "c", "backend": { "type": "socket", "data": {
        "addr": { "type": "unix", "data": { "path": second } }, "server": true, "wait": false } } }),
    );
    // The first monitor's client sends without ever reading.
    let mut deaf = m.input.get_ref().try_clone().unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let flood = "{\"execute\":\"query-qmp-schema\"}".repeat(100);
    let mut sent = 0;
    while sent < 10_000 && deaf.write_all(flood.as_bytes()).is_ok() {
        sent += 100;
    }
    assert!(sent < 10_000, "commands are taken without end");
    let status = std::fs::read_to_string(format!("/proc/{}/status", m.child.id())).unwrap();
    let rss = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 200 << 10, "{rss}");
}

#[test]
fn character_devices() {
    let mut m = Machine::ready(&["-machine", "none", "-chardev", "ringbuf,id=ring,size=16"]);
    m.run("ringbuf-write", json!({ "device": "ring", "data": "hello" }));
    assert_eq!(m.run("ringbuf-read", json!({ "device": "ring", "size": 100 })), "hello");
    let pty = m.run("chardev-add", json!({ "id": "p", "backend": { "type": "pty", "data": {} } }));
    let name = pty["pty"].as_str().unwrap();
    assert!(name.starts_with("/dev/pts/"));
    let all = m.run("query-chardev", json!({}));
    assert!(all.as_array().unwrap().iter().any(|c| c["filename"] == format!("pty:{name}")), "{all}");
    m.run("chardev-remove", json!({ "id": "p" }));
    assert!(m.error("chardev-remove", json!({ "id": "p" })).contains("not found"));
    assert!(m.error("chardev-add", json!({ "id": "q", "backend": { "type": "sokcet" } })).contains("socket"));
}

#[test]
fn options_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.cfg");
    std::fs::write(
        &file,
        "# comment\n[machine]\n  type = \"none\"\n[chardev \"c\"]\n  backend = \"ringbuf\"\n",
    )
    .unwrap();
    let mut m = Machine::ready(&["-readconfig", file.to_str().unwrap()]);
    let all = m.run("query-chardev", json!({}));
    assert!(all.as_array().unwrap().iter().any(|c| c["label"] == "c" && c["filename"] == "ringbuf"), "{all}");
    std::fs::write(&file, "[devcie \"x\"]\n").unwrap();
    let end = finish(&["-readconfig", file.to_str().unwrap()]);
    assert!(end.stderr.contains("line 1") && end.stderr.contains("device"), "{}", end.stderr);
}

/// QEMU's own Python library as client.
#[test]
#[ignore = "installs qemu.qmp from PyPI"]
fn python_client() {
    let cache = std::env::temp_dir().join("kvasir-test-venv");
    if !cache.join("bin/python").exists() {
        let made = Command::new("python3").args(["-m", "venv"]).arg(&cache).status().unwrap();
        assert!(made.success());
    }
    let pip = Command::new(cache.join("bin/pip")).args(["install", "-q", "qemu.qmp"]).status().unwrap();
    assert!(pip.success());
    let m = Machine::start(&NONE);
    let second = m.path("python");
    drop(m);
    let script = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError
async def main():
    c = QMPClient('test')
    await c.connect(sys.argv[1])
    with c.listener('SHUTDOWN') as listener:
        print((await c.execute('query-status'))['status'])
        try:
            await c.execute('nope')
        except ExecuteError as e:
            print(e.error.error.class_)
        await c.execute('quit')
        print((await listener.get())['data']['reason'])
    await c.disconnect()
asyncio.run(main())
"#;
    let monitor = format!("unix:{},server=on,wait=off", second.display());
    std::fs::create_dir_all(second.parent().unwrap()).unwrap();
    let mut child =
        qemu(&["-S", "-nodefaults", "-machine", "none", "-accel", "tcg", "-qmp", &monitor]).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while !second.exists() {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
    let out = Command::new(cache.join("bin/python")).args(["-c", script]).arg(&second).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(
        text,
        "prelaunch\nCommandNotFound\nhost-qmp-quit\n",
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(child.wait().unwrap().success());
}

/// A guest's console and the monitor share the terminal; escape keys switch.
#[test]
#[ignore = "needs the guest: cargo xtask guest"]
fn nographic() {
    let (kernel, initrd) = (guest("bzImage"), guest("initramfs.cpio"));
    let mut command = qemu(&[
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-m",
        "256",
        "-nographic",
        "-kernel",
        &kernel,
        "-initrd",
        &initrd,
        "-append",
        "console=ttyS0 quiet",
        "-no-reboot",
        "-nic",
        "none",
    ]);
    command.stdin(Stdio::piped());
    let mut run = Run::start(command, Duration::from_secs(300));
    run.wait_for(READY);
    run.send(b"\x01c");
    run.wait_for("(qemu) ");
    run.send(b"info stat\t\r");
    run.wait_for("VM status: running");
    run.send(b"\x01c");
    run.send(b"\x01c");
    run.send(b"quit\r");
    assert_eq!(run.finish().status, Some(0));
}

/// Real gdb: registers, memory, software and hardware breakpoints, watchpoints, steps.
#[test]
fn gdb() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    // mov ecx, 7; nop; inc eax; mov [0x200000], eax; jmp to the inc
    let code = [0xb9, 7, 0, 0, 0, 0x90, 0xff, 0xc0, 0x89, 0x04, 0x25, 0, 0, 0x20, 0, 0xeb, 0xf5];
    std::fs::write(&kernel, kernel_with(&code)).unwrap();
    let socket = dir.path().join("gdb");
    let target = format!("unix:{},server=on,wait=off", socket.display());
    let m = Machine::ready(&[
        "-machine",
        "q35",
        "-S",
        "-m",
        "64",
        "-kernel",
        kernel.to_str().unwrap(),
        "-gdb",
        &target,
    ]);
    let script = format!(
        "set pagination off\nset confirm off\nset architecture i386:x86-64\ntarget remote {}\nprintf \"start %lx\\n\", $rip\nx/2xb 0x100000\nstepi\nprintf \"step %lx %d\\n\", $rip, $ecx\nbreak *0x100006\ncontinue\nprintf \"soft %lx\\n\", $rip\ndelete\nhbreak *0x100008\ncontinue\nprintf \"hard %lx %d\\n\", $rip, $eax\ndelete\nset $eax=41\nwatch *(int*)0x200000\ncontinue\nprintf \"watch %d\\n\", *(int*)0x200000\ndelete\ninfo threads\ndetach\nquit\n",
        socket.display()
    );
    let file = dir.path().join("script");
    std::fs::write(&file, script).unwrap();
    let out =
        Command::new("gdb").args(["-nx", "-batch", "-x"]).arg(&file).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let errors = String::from_utf8_lossy(&out.stderr);
    for line in
        ["start 100000", "0xb9\t0x07", "step 100005 7", "soft 100006", "hard 100008 1", "watch 41", "CPU#0"]
    {
        assert!(text.contains(line), "no '{line}':\n{text}\n{errors}");
    }
    drop(m);
}
