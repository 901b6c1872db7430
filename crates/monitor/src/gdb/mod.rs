//! A server of GDB's remote serial protocol (GDB manual, appendix E): registers, memory, breakpoints, steps.
//!
//! vCPUs are threads, numbered from 1. While a debugger is connected all vCPUs stop and go together, except for steps.

mod packet;
mod registers;

use crate::context::lock;
use crate::output::Output;
use accel::{BreakKind, GuestDebug, HardwareBreak};
use bus::{CharEvent, CharFrontend, Chardev};
use machine::control::Subscription;
use machine::inspect::Access;
use machine::{Machine, Notice, Remote, RunState};
use packet::{Framer, Item, hex, unhex};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// Longest packet in bytes.
const PACKET: usize = 16 << 10;
/// Most breakpoints of each kind.
const MOST_BREAKPOINTS: usize = 1024;

struct Session {
    remote: Remote,
    output: Arc<Output>,
    state: Mutex<State>,
    subscription: OnceLock<Subscription>,
}

#[derive(Default)]
struct State {
    framer: Framer,
    connected: bool,
    /// No acknowledgements.
    quiet: bool,
    /// vCPU that registers and memory are asked of.
    cpu: u32,
    /// The guest runs, and the debugger waits for it to stop.
    waiting: bool,
    software: BTreeSet<u64>,
    hardware: Vec<HardwareBreak>,
    /// vCPU that makes one step.
    stepping: Option<u32>,
}

/// Lets debuggers connect to a character device.
///
/// # Errors
/// The host gives no thread.
pub fn serve(remote: &Remote, chardev: Arc<dyn Chardev>) -> std::io::Result<()> {
    let output = Output::start(chardev.clone())?;
    let session = Arc::new(Session {
        remote: remote.clone(),
        output,
        state: Mutex::default(),
        subscription: OnceLock::new(),
    });
    let weak = Arc::downgrade(&session);
    let subscription = remote.subscribe(move |notice| {
        if let Some(session) = Weak::upgrade(&weak) {
            session.notice(notice);
        }
    });
    // It was made just above, so it is empty.
    let _ = session.subscription.set(subscription);
    chardev.attach(session);
    Ok(())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.output.close();
    }
}

impl CharFrontend for Session {
    fn receive(&self, data: &[u8]) -> usize {
        let mut items = Vec::new();
        lock(&self.state).framer.feed(data, |item| items.push(item));
        for item in items {
            match item {
                Item::Interrupt => self.interrupt(),
                Item::Bad => {
                    if !lock(&self.state).quiet {
                        self.output.answer(b"-".to_vec());
                    }
                }
                Item::Packet(text) => {
                    if !lock(&self.state).quiet {
                        self.output.answer(b"+".to_vec());
                    }
                    if let Some(answer) = self.packet(&text) {
                        self.reply(&answer);
                    }
                }
            }
        }
        data.len()
    }

    fn event(&self, event: CharEvent) {
        match event {
            CharEvent::Opened => {
                *lock(&self.state) = State { connected: true, ..State::default() };
                // The guest waits for its debugger.
                let _ = self.remote.call(Machine::pause);
            }
            CharEvent::Closed => {
                let was = std::mem::take(&mut *lock(&self.state));
                self.output.discard();
                if was.connected {
                    self.remove_all();
                }
            }
            _ => {}
        }
    }
}

impl Session {
    fn reply(&self, text: &[u8]) {
        self.output.answer(packet::framed(text));
    }

    fn notice(&self, notice: &Notice) {
        let answer = {
            let mut state = lock(&self.state);
            if !state.waiting {
                return;
            }
            let answer = match notice {
                Notice::Debug(index, stop) => self.debug_stop(&mut state, *index, stop),
                // A debugger's stop follows with its own reason.
                Notice::Stop if self.remote.state() == RunState::Debug => return,
                Notice::Stop => format!("T02thread:{:02x};", state.cpu + 1),
                Notice::Shutdown(_) if self.remote.state() != RunState::Running => return,
                Notice::Shutdown(_) => "W00".into(),
                _ => return,
            };
            state.waiting = false;
            answer
        };
        self.output.event(packet::framed(answer.as_bytes()));
    }

    fn debug_stop(&self, state: &mut State, index: u32, stop: &accel::DebugExit) -> String {
        state.cpu = index;
        state.stepping = None;
        let thread = format!("thread:{:02x};", index + 1);
        for (i, b) in state.hardware.iter().take(4).enumerate() {
            let kind = match b.kind {
                BreakKind::Execute => continue,
                BreakKind::Write => "watch",
                BreakKind::Access => "awatch",
            };
            if stop.vector == 1 && stop.dr6 >> i & 1 != 0 {
                return format!("T05{thread}{kind}:{:x};", b.address);
            }
        }
        format!("T05{thread}")
    }

    /// Ctrl-C in the debugger.
    fn interrupt(&self) {
        let _ = self.remote.call(Machine::pause);
    }

    /// What a vCPU is told about breakpoints and steps.
    fn apply(&self) -> Result<(), String> {
        let (software, hardware, stepping) = {
            let state = lock(&self.state);
            (state.software.clone(), state.hardware.clone(), state.stepping)
        };
        let result = self.remote.call(move |m| {
            for index in 0..m.vcpu_count() {
                let debug = GuestDebug {
                    single_step: stepping == Some(index),
                    software: software.iter().copied().collect(),
                    hardware: hardware.clone(),
                };
                m.with_vcpu(index, move |vcpu| vcpu.set_debug(&debug))?;
            }
            Ok::<(), machine::Error>(())
        });
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(e) => Err(e.to_string()),
        }
    }

    /// The debugger has gone: no breakpoint may stay.
    fn remove_all(&self) {
        if let Err(e) = self.apply() {
            tracing::warn!("breakpoints cannot be removed: {e}");
        }
        let resumed = self.remote.call(|m| {
            // What a debugger that died left in the guest's memory.
            let left = std::mem::take(m.saved_bytes());
            if !left.is_empty() {
                let cpu = m.registers(0)?;
                for (address, byte) in left {
                    // A page that is gone needs no repair.
                    let _ = m.linear(&cpu, address, Access::Write(&[byte]));
                }
            }
            match m.state() {
                RunState::Debug | RunState::Paused => m.resume(),
                _ => Ok(()),
            }
        });
        if let Ok(Err(e)) = resumed {
            tracing::warn!("the guest cannot go on after its debugger left: {e}");
        }
    }

    fn go(&self, step: Option<u32>) -> Option<Vec<u8>> {
        {
            let mut state = lock(&self.state);
            state.stepping = step;
            state.waiting = true;
        }
        let result = self.apply().and_then(|()| {
            let resumed = self.remote.call(move |m| m.resume_only(step));
            match resumed {
                Ok(result) => result.map_err(|e| e.to_string()),
                Err(e) => Err(e.to_string()),
            }
        });
        match result {
            Ok(()) => None,
            Err(e) => {
                tracing::warn!("debugger: {e}");
                lock(&self.state).waiting = false;
                Some(b"E16".to_vec())
            }
        }
    }

    /// Serves a packet. `None` if the answer comes later.
    fn packet(&self, text: &[u8]) -> Option<Vec<u8>> {
        let ok = || Some(b"OK".to_vec());
        let error = || Some(b"E22".to_vec());
        let (&kind, rest) = text.split_first()?;
        let line = String::from_utf8_lossy(rest).into_owned();
        match kind {
            b'?' => Some(format!("T05thread:{:02x};", lock(&self.state).cpu + 1).into_bytes()),
            b'q' => Some(self.query(&line)),
            b'Q' if line == "StartNoAckMode" => {
                // The answer itself is still acknowledged.
                lock(&self.state).quiet = true;
                ok()
            }
            b'H' => {
                let (what, id) = line.split_at(line.len().min(1));
                if what == "g"
                    && let Some(cpu) = packet::number(id).and_then(|n| n.checked_sub(1))
                    && let Ok(cpu) = u32::try_from(cpu)
                {
                    lock(&self.state).cpu = cpu;
                }
                ok()
            }
            b'T' => {
                let count = self.remote.call(|m| m.vcpu_count()).unwrap_or(0);
                let alive = packet::number(&line).is_some_and(|n| n >= 1 && n <= u64::from(count));
                if alive { ok() } else { error() }
            }
            b'g' => self.with_state(registers::all).map(|d| hex(&d)).or_else(error),
            b'G' => self.write_registers(rest).map_or_else(error, |()| ok()),
            b'p' => {
                let n = packet::number(&line)?;
                let value = self.with_state(move |cpu| registers::one(cpu, n as usize));
                value.flatten().map(|d| hex(&d)).or_else(error)
            }
            b'P' => self.write_register(&line).map_or_else(error, |()| ok()),
            b'm' => self.read_memory(&line).map(|d| hex(&d)).or_else(|| Some(b"E14".to_vec())),
            b'M' => self.write_memory(rest, true).map_or_else(|| Some(b"E14".to_vec()), |()| ok()),
            b'X' => self.write_memory(rest, false).map_or_else(|| Some(b"E14".to_vec()), |()| ok()),
            b'c' => self.go(None),
            b's' => {
                let cpu = lock(&self.state).cpu;
                self.go(Some(cpu))
            }
            b'v' if line == "Cont?" => Some(b"vCont;c;C;s;S".to_vec()),
            b'v' if line.starts_with("Cont;") => self.continue_as(&line["Cont;".len()..]),
            b'v' if line.starts_with("Kill") => {
                self.remote.quit_because(machine::Cause::HostUi);
                ok()
            }
            b'Z' => self.breakpoint(&line, true).map(Vec::from).or_else(error),
            b'z' => self.breakpoint(&line, false).map(Vec::from).or_else(error),
            b'D' => {
                *lock(&self.state) = State { connected: true, ..State::default() };
                self.remove_all();
                ok()
            }
            b'k' => {
                self.remote.quit_because(machine::Cause::HostUi);
                None
            }
            _ => Some(Vec::new()),
        }
    }

    fn query(&self, text: &str) -> Vec<u8> {
        if text.starts_with("Supported") {
            return format!("PacketSize={PACKET:x};qXfer:features:read+;vContSupported+;QStartNoAckMode+")
                .into();
        }
        if let Some(range) = text.strip_prefix("Xfer:features:read:target.xml:") {
            let mut parts = range.split(',').filter_map(packet::number);
            let (Some(offset), Some(len)) = (parts.next(), parts.next()) else { return b"E00".to_vec() };
            let xml = registers::description();
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(xml.len());
            let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX)).min(xml.len());
            let mark = if end == xml.len() { 'l' } else { 'm' };
            return format!("{mark}{}", &xml[start..end]).into();
        }
        match text {
            "C" => format!("QC{:02x}", lock(&self.state).cpu + 1).into(),
            "fThreadInfo" => {
                let count = self.remote.call(|m| m.vcpu_count()).unwrap_or(0);
                let ids: Vec<String> = (1..=count).map(|i| format!("{i:02x}")).collect();
                format!("m{}", ids.join(",")).into()
            }
            "sThreadInfo" => b"l".to_vec(),
            "Attached" => b"1".to_vec(),
            _ => match text.strip_prefix("ThreadExtraInfo,") {
                Some(id) => {
                    let n = packet::number(id).unwrap_or(0).saturating_sub(1);
                    hex(format!("CPU#{n}").as_bytes())
                }
                None => Vec::new(),
            },
        }
    }

    /// `vCont` with one action for each thread, or all.
    fn continue_as(&self, actions: &str) -> Option<Vec<u8>> {
        for action in actions.split(';') {
            let (what, thread) = action.split_once(':').unwrap_or((action, ""));
            if what.starts_with(['s', 'S']) {
                let cpu = packet::number(thread).and_then(|n| u32::try_from(n.checked_sub(1)?).ok());
                let cpu = cpu.unwrap_or_else(|| lock(&self.state).cpu);
                return self.go(Some(cpu));
            }
        }
        self.go(None)
    }

    fn with_state<R: Send + 'static>(
        &self,
        f: impl FnOnce(&accel::CpuState) -> R + Send + 'static,
    ) -> Option<R> {
        let index = lock(&self.state).cpu;
        self.remote.call(move |m| m.cpu_state(index).ok().map(|cpu| f(&cpu))).ok()?
    }

    fn change_state(
        &self,
        f: impl FnOnce(&mut accel::CpuState) -> Option<()> + Send + 'static,
    ) -> Option<()> {
        let index = lock(&self.state).cpu;
        self.remote
            .call(move |m| {
                let mut cpu = m.cpu_state(index).ok()?;
                f(&mut cpu)?;
                m.with_vcpu(index, move |vcpu| vcpu.load(&cpu)).ok()
            })
            .ok()?
    }

    fn write_registers(&self, text: &[u8]) -> Option<()> {
        let data = unhex(text)?;
        self.change_state(move |cpu| registers::set_all(cpu, &data))
    }

    fn write_register(&self, text: &str) -> Option<()> {
        let (n, value) = text.split_once('=')?;
        let n = packet::number(n)? as usize;
        let value = unhex(value.as_bytes())?;
        self.change_state(move |cpu| registers::set_one(cpu, n, &value))
    }

    fn read_memory(&self, text: &str) -> Option<Vec<u8>> {
        let (address, len) = text.split_once(',')?;
        let (address, len) = (packet::number(address)?, packet::number(len)?);
        let len = usize::try_from(len).ok()?.min(PACKET / 2);
        let index = lock(&self.state).cpu;
        self.remote
            .call(move |m| {
                let cpu = m.registers(index).ok()?;
                let mut data = vec![0; len];
                match m.linear(&cpu, address, Access::Read(&mut data)) {
                    Ok(()) => Some(data),
                    // As much as there is.
                    Err(at) => {
                        let n = usize::try_from(at.checked_sub(address)?).ok().filter(|n| *n > 0)?;
                        data.truncate(n);
                        Some(data)
                    }
                }
            })
            .ok()?
    }

    fn write_memory(&self, text: &[u8], is_hex: bool) -> Option<()> {
        let colon = text.iter().position(|b| *b == b':')?;
        let (place, data) = (std::str::from_utf8(&text[..colon]).ok()?, &text[colon + 1..]);
        let (address, len) = place.split_once(',')?;
        let (address, len) = (packet::number(address)?, packet::number(len)?);
        let data = if is_hex { unhex(data)? } else { packet::unescape(data) };
        if data.len() as u64 != len {
            return None;
        }
        let index = lock(&self.state).cpu;
        self.remote
            .call(move |m| {
                let cpu = m.registers(index).ok()?;
                m.linear(&cpu, address, Access::Write(&data)).ok()
            })
            .ok()?
    }

    /// `Z` and `z`: inserts or removes a breakpoint. The answer, or `None` for an error.
    fn breakpoint(&self, text: &str, insert: bool) -> Option<&'static [u8]> {
        let mut parts = text.split(',');
        let kind = parts.next()?;
        let address = packet::number(parts.next()?)?;
        let len = packet::number(parts.next()?)?;
        if kind == "0" {
            return self.software(address, insert).map(|()| &b"OK"[..]);
        }
        let kind = match kind {
            "1" => BreakKind::Execute,
            "2" => BreakKind::Write,
            "4" => BreakKind::Access,
            // Processors have no breakpoints for reads alone.
            _ => return Some(b""),
        };
        let len = if kind == BreakKind::Execute { 1 } else { len };
        if ![1, 2, 4, 8].contains(&len) || address % len != 0 {
            return None;
        }
        let wanted = HardwareBreak { address, kind, len: len as u8 };
        {
            let mut state = lock(&self.state);
            let before = state.hardware.len();
            state.hardware.retain(|b| *b != wanted);
            if insert {
                if state.hardware.len() == 4 {
                    return None;
                }
                state.hardware.push(wanted);
            } else if before == state.hardware.len() {
                return None;
            }
        }
        self.apply().ok()?;
        Some(b"OK")
    }

    /// Software breakpoints: the byte is replaced by INT3, in the guest's memory. GDB removes them before it reads or steps over them, and what
    /// it wrote is put back here.
    fn software(&self, address: u64, insert: bool) -> Option<()> {
        const INT3: u8 = 0xcc;
        let index = {
            let mut state = lock(&self.state);
            if insert {
                if state.software.len() >= MOST_BREAKPOINTS {
                    return None;
                }
                state.software.insert(address);
            } else if !state.software.remove(&address) {
                return None;
            }
            state.cpu
        };
        let done = self
            .remote
            .call(move |m| {
                let cpu = m.registers(index).ok()?;
                if insert {
                    let mut old = [0];
                    m.linear(&cpu, address, Access::Read(&mut old)).ok()?;
                    m.linear(&cpu, address, Access::Write(&[INT3])).ok()?;
                    m.saved_bytes().insert(address, old[0]);
                } else {
                    let old = m.saved_bytes().remove(&address)?;
                    m.linear(&cpu, address, Access::Write(&[old])).ok()?;
                }
                Some(())
            })
            .ok()
            .flatten();
        if done.is_none() && insert {
            lock(&self.state).software.remove(&address);
        }
        done?;
        self.apply().ok()
    }
}
