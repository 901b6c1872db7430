//! Console (virtio 1.2, 5.3): one port, window size, emergency write.

use super::{RingSpec, VirtioDevice, read_structure};
use crate::model::{CreateError, Kind, Model, Parts};
use base::props::{Bag, Properties};
use base::{Timer, Timers};
use bus::virtio::{Activation, Chain, Interrupt, QueueError, SharedQueue, device_id};
use bus::{CharEvent, CharFrontend, Chardev, State, StateError};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Instant;

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-console",
    about: "virtio console (hvc0 in Linux)",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-console`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Character device at the other end (required).
    pub chardev: String,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec: Spec = bag.spec()?;
    if spec.chardev.is_empty() {
        return Err(CreateError::Other(
            "virtio-console: chardev= is missing; name a character device".into(),
        ));
    }
    let chardev = parts.take_chardev(&spec.chardev)?;
    Ok(Box::new(Console::new(&spec, chardev, parts.timers())))
}

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Linux gives the receive queue a page an entry, so long queues cost the guest memory.
const QUEUE_SIZE: u16 = 64;

/// Feature bits (virtio 1.2, 5.3.3).
const F_SIZE: u64 = 1 << 0;
const F_EMERGENCY_WRITE: u64 = 1 << 2;
/// Offset of the emergency write register in configuration space.
const EMERGENCY_WRITE: u64 = 8;

/// Bytes sent by one notification at most; the rest is left to the timer, so that no vCPU is held here.
const BURST: u64 = 256 << 10;

/// The device.
pub struct Console {
    ring: RingSpec,
    port: Arc<Port>,
}

/// The port, shared by vCPU threads, the back end's thread and the timer.
///
/// Lock order: none of the three locks is taken under another, and the back end is never called under `receive` or
/// `window`, so that it may call back.
struct Port {
    chardev: Arc<dyn Chardev>,
    transmit: Mutex<Half>,
    receive: Mutex<Half>,
    window: Mutex<Window>,
    timer: Timer,
}

/// One direction.
#[derive(Default)]
struct Half {
    running: bool,
    active: Option<(SharedQueue, GuestMemory, Interrupt)>,
    chain: Chain,
    /// Receiving: the back end has input that we had no room for.
    owed: bool,
}

#[derive(Default)]
struct Window {
    columns: u16,
    rows: u16,
    interrupt: Option<Interrupt>,
    running: bool,
    /// The size is another than the driver was last told.
    news: bool,
}

impl Window {
    fn tell(&mut self) {
        if self.running
            && let Some(interrupt) = &self.interrupt
            && std::mem::take(&mut self.news)
        {
            interrupt.config_changed();
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    columns: u16,
    rows: u16,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Console {
    /// A console connected to `chardev`; `timers` continues output that comes in large bursts.
    pub fn new(spec: &Spec, chardev: Arc<dyn Chardev>, timers: &Timers) -> Self {
        let port = Arc::new_cyclic(|me: &Weak<Port>| {
            let me = me.clone();
            let timer = timers.timer(move || {
                if let Some(port) = me.upgrade() {
                    port.send();
                }
            });
            Port {
                chardev,
                transmit: Mutex::default(),
                receive: Mutex::default(),
                window: Mutex::default(),
                timer,
            }
        });
        port.chardev.attach(Arc::new(Frontend(Arc::downgrade(&port))));
        Self { ring: spec.ring.clone(), port }
    }
}

impl Port {
    /// Takes output from the transmit queue.
    fn send(&self) {
        let mut half = lock(&self.transmit);
        if !half.running {
            return;
        }
        let Half { active: Some((queue, memory, interrupt)), chain, .. } = &mut *half else { return };
        let mut queue = lock(queue);
        if queue.is_broken() {
            return;
        }
        let mut again = false;
        let result = (|| {
            let mut left = BURST;
            // Zero-length buffers count too, so that the loop ends whatever the driver does.
            for _ in 0..4 * queue.size() {
                if left == 0 {
                    break;
                }
                if !queue.pop_or_listen(chain)? {
                    break;
                }
                left = left.saturating_sub(self.write_out(chain, memory)?);
                queue.push(chain, 0)?;
            }
            again = queue.enable_notifications()?;
            queue.publish()
        })();
        match result {
            Ok(true) => interrupt.queue(TRANSMIT),
            Ok(false) => {}
            Err(e) => interrupt.fail(&format!("transmit queue: {e}")),
        }
        if again {
            self.timer.arm(Instant::now());
        }
    }

    fn write_out(&self, chain: &Chain, memory: &GuestMemory) -> Result<u64, QueueError> {
        // Consoles write lines; what is longer than this is a mistake or an attack and is cut.
        const LONGEST: u64 = 1 << 20;
        let mut reader = chain.reader(memory);
        let mut buffer = [0; 1024];
        let mut total = 0;
        while total < LONGEST {
            let n = reader.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            self.chardev.write(&buffer[..n]);
            total += n as u64;
        }
        Ok(total)
    }

    /// Puts input into the receive queue; returns how much there was room for.
    fn deliver(&self, data: &[u8]) -> usize {
        let mut half = lock(&self.receive);
        let half = &mut *half;
        let mut done = 0;
        if let (true, Some((queue, memory, interrupt))) = (half.running, &half.active) {
            let mut queue = lock(queue);
            let chain = &mut half.chain;
            let result = (|| {
                for _ in 0..2 * queue.size() {
                    if done == data.len() {
                        break;
                    }
                    if !queue.pop_or_listen(chain)? {
                        break;
                    }
                    let mut writer = chain.writer(memory);
                    done += writer.write(&data[done..])?;
                    let written = writer.written();
                    queue.push(chain, written)?;
                }
                queue.publish()
            })();
            match result {
                Ok(true) => interrupt.queue(RECEIVE),
                Ok(false) | Err(QueueError::Broken) => {}
                Err(e) => interrupt.fail(&format!("receive queue: {e}")),
            }
        }
        half.owed |= done < data.len();
        done
    }

    /// The driver has given receive buffers, or the port has begun to work.
    fn room(&self) {
        let owed = std::mem::take(&mut lock(&self.receive).owed);
        if owed {
            self.chardev.resume_input();
        }
    }

    fn resize(&self, columns: u16, rows: u16) {
        let mut window = lock(&self.window);
        if (window.columns, window.rows) != (columns, rows) {
            (window.columns, window.rows) = (columns, rows);
            // A driver that comes later reads the size when it starts.
            window.news = window.interrupt.is_some();
            window.tell();
        }
    }

    fn set_running(&self, running: bool) {
        lock(&self.transmit).running = running;
        lock(&self.receive).running = running;
        let mut window = lock(&self.window);
        window.running = running;
        window.tell();
    }
}

/// What the back end holds; the device may go before it.
struct Frontend(Weak<Port>);

impl CharFrontend for Frontend {
    fn receive(&self, data: &[u8]) -> usize {
        // Input for a device that has gone goes nowhere.
        self.0.upgrade().map_or(data.len(), |port| port.deliver(data))
    }

    fn event(&self, event: CharEvent) {
        if let (Some(port), CharEvent::Resize { columns, rows }) = (self.0.upgrade(), event) {
            port.resize(columns, rows);
        }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::CONSOLE
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERGENCY_WRITE | self.ring.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let window = lock(&self.port.window);
        let mut config = [0; 12];
        config[..2].copy_from_slice(&window.columns.to_le_bytes());
        config[2..4].copy_from_slice(&window.rows.to_le_bytes());
        config[4] = 1; // number of ports
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Works at any time, also before a driver is there (virtio 1.2, 5.3.4).
        if offset == EMERGENCY_WRITE && data.len() <= 4 {
            self.port.chardev.write(&data[..1]);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { queues, memory, interrupt, .. } = activation;
        lock(&self.port.window).interrupt = Some(interrupt.clone());
        for (queue, half) in queues.into_iter().zip([&self.port.receive, &self.port.transmit]) {
            lock(half).active = queue.map(|q| (q, memory.clone(), interrupt.clone()));
        }
        // Buffers for input are of no interest until there is input.
        if let Some((queue, ..)) = &lock(&self.port.receive).active {
            let _ = lock(queue).disable_notifications(); // a hint; an error shows at the next use
        }
        self.port.room();
        Ok(())
    }

    fn notify(&mut self, queue: u16) {
        if queue == TRANSMIT {
            self.port.send();
        } else {
            self.port.room();
        }
    }

    fn reset(&mut self) {
        self.port.timer.disarm();
        let mut window = lock(&self.port.window);
        (window.interrupt, window.news) = (None, false);
        drop(window);
        lock(&self.port.receive).active = None;
        lock(&self.port.transmit).active = None;
    }

    fn start(&mut self) -> io::Result<()> {
        self.port.set_running(true);
        self.port.send();
        self.port.room();
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.port.timer.disarm();
        self.port.set_running(false);
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        let window = lock(&self.port.window);
        State::new(MODEL.name, 1, &Saved { columns: window.columns, rows: window.rows })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(MODEL.name, 1)?;
        // The terminal here may have another size than the one there had; the driver is then told when it runs.
        let mut window = lock(&self.port.window);
        if (window.columns, window.rows) == (0, 0) {
            (window.columns, window.rows) = (saved.columns, saved.rows);
        }
        window.news = (window.columns, window.rows) != (saved.columns, saved.rows);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::virtio::testing::{Guest, TRANSPORTS, Transport};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A terminal that remembers.
    #[derive(Default)]
    struct Terminal {
        output: Mutex<Vec<u8>>,
        frontend: Mutex<Option<Arc<dyn CharFrontend>>>,
        resumed: AtomicU32,
    }

    impl Chardev for Terminal {
        fn write(&self, data: &[u8]) {
            lock(&self.output).extend(data);
        }
        fn attach(&self, frontend: Arc<dyn CharFrontend>) {
            *lock(&self.frontend) = Some(frontend);
        }
        fn resume_input(&self) {
            self.resumed.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Terminal {
        fn frontend(&self) -> Arc<dyn CharFrontend> {
            lock(&self.frontend).clone().unwrap()
        }
    }

    fn console(terminal: &Arc<Terminal>) -> Box<dyn VirtioDevice> {
        Box::new(Console::new(&Spec::default(), terminal.clone(), &Timers::new()))
    }

    fn guest(transport: Transport) -> (Guest, Arc<Terminal>) {
        let terminal = Arc::new(Terminal::default());
        let mut guest = Guest::new(console(&terminal), transport, true);
        guest.bring_up(u64::MAX, 2);
        (guest, terminal)
    }

    #[test]
    fn output_comes_out() {
        for transport in TRANSPORTS {
            let (mut guest, terminal) = guest(transport);
            guest.mem.write(0x10_0000, b"hello ").unwrap();
            guest.mem.write(0x10_1000, b"world").unwrap();
            assert_eq!(guest.request(TRANSMIT, &[(0x10_0000, 6, false), (0x10_1000, 5, false)]), 0);
            assert_eq!(*lock(&terminal.output), b"hello world");
            assert!(guest.take_interrupt(TRANSMIT));
        }
    }

    #[test]
    fn large_output_comes_whole_and_in_order() {
        let terminal = Arc::new(Terminal::default());
        let timers = Timers::new();
        let device = Box::new(Console::new(&Spec::default(), terminal.clone(), &timers));
        let mut guest = Guest::new(device, Transport::Pci, false);
        guest.bring_up(0, 2);
        let pattern: Vec<u8> = (0..0x8_0000u32).map(|i| (i / 7) as u8).collect();
        guest.mem.write(0x10_0000, &pattern).unwrap();
        // All made available before the one notification: more than one burst.
        for i in 0..32 {
            guest.rings[1].add(&[(0x10_0000 + i * 0x4000, 0x4000, false)]).unwrap();
        }
        guest.notify(TRANSMIT);
        for _ in 0..32 {
            guest.wait_used(TRANSMIT);
        }
        assert!(*lock(&terminal.output) == pattern);
    }

    #[test]
    fn input_goes_in_and_waits_for_room() {
        for transport in TRANSPORTS {
            let (mut guest, terminal) = guest(transport);
            let frontend = terminal.frontend();
            assert_eq!(frontend.receive(b"early"), 0, "no buffers yet");
            let before = terminal.resumed.load(Ordering::SeqCst);
            let first = guest.submit(RECEIVE, &[(0x10_0000, 4, true)]).unwrap();
            let second = guest.submit(RECEIVE, &[(0x10_1000, 2, true)]).unwrap();
            assert!(terminal.resumed.load(Ordering::SeqCst) > before, "there is room now");
            assert_eq!(frontend.receive(b"abcdefgh"), 6);
            assert_eq!((guest.wait_used(RECEIVE), guest.wait_used(RECEIVE)), ((first, 4), (second, 2)));
            assert!(guest.take_interrupt(RECEIVE));
            let mut got = [0; 4];
            guest.mem.read(0x10_0000, &mut got).unwrap();
            assert_eq!(&got, b"abcd");
            let before = terminal.resumed.load(Ordering::SeqCst);
            guest.submit(RECEIVE, &[(0x10_0000, 8, true)]).unwrap();
            assert!(terminal.resumed.load(Ordering::SeqCst) > before);
            assert_eq!(frontend.receive(b"gh"), 2);
            assert_eq!(guest.wait_used(RECEIVE).1, 2);
        }
    }

    #[test]
    fn buffers_without_input_cause_no_exits() {
        for features in [0, !(1 << 34), u64::MAX] {
            let terminal = Arc::new(Terminal::default());
            let mut guest = Guest::new(console(&terminal), Transport::Pci, false);
            guest.bring_up(features, 2);
            let mut wanted = 0;
            for _ in 0..20 {
                let mark = guest.rings[0].mark();
                guest.rings[0].add(&[(0x10_0000, 8, true)]).unwrap();
                wanted += u32::from(guest.rings[0].wants_notification(mark));
            }
            assert!(wanted <= 1, "{wanted} notifications");
        }
    }

    #[test]
    fn window_size() {
        for transport in TRANSPORTS {
            let (guest, terminal) = guest(transport);
            assert_eq!(guest.read_config::<4>(0), [0; 4]);
            let before = guest.generation();
            terminal.frontend().event(CharEvent::Resize { columns: 132, rows: 43 });
            assert!(guest.take_config_interrupt());
            assert_ne!(guest.generation(), before);
            assert_eq!(guest.read_config::<4>(0), [132, 0, 43, 0]);
            terminal.frontend().event(CharEvent::Resize { columns: 132, rows: 43 });
            assert!(!guest.take_config_interrupt(), "nothing new");
            // While paused no interrupt comes; it is made up for.
            guest.device().pause().unwrap();
            terminal.frontend().event(CharEvent::Resize { columns: 80, rows: 25 });
            assert!(!guest.take_config_interrupt());
            guest.device().start().unwrap();
            assert!(guest.take_config_interrupt());
        }
    }

    #[test]
    fn emergency_output_needs_no_driver() {
        let terminal = Arc::new(Terminal::default());
        let guest = Guest::new(console(&terminal), Transport::Mmio, false);
        guest.write_config(EMERGENCY_WRITE, &u32::from(b'!').to_le_bytes());
        guest.write_config(EMERGENCY_WRITE, b"?");
        guest.write_config(0, b"x");
        assert_eq!(*lock(&terminal.output), b"!?");
    }

    #[test]
    fn a_new_terminal_has_its_own_size() {
        let (guest, terminal) = guest(Transport::Pci);
        terminal.frontend().event(CharEvent::Resize { columns: 80, rows: 25 });
        guest.take_config_interrupt();
        guest.device().pause().unwrap();
        let id_guest = guest.migrate(console(&Arc::new(Terminal::default())));
        assert_eq!(id_guest.read_config::<4>(0), [80, 0, 25, 0]);
        assert!(!id_guest.take_config_interrupt());
    }

    #[test]
    fn paused_consoles_take_no_input_and_devices_that_went_swallow_it() {
        let (mut guest, terminal) = guest(Transport::Pci);
        guest.submit(RECEIVE, &[(0x10_0000, 4, true)]).unwrap();
        guest.device().pause().unwrap();
        let frontend = terminal.frontend();
        assert_eq!(frontend.receive(b"abc"), 0);
        let before = terminal.resumed.load(Ordering::SeqCst);
        guest.device().start().unwrap();
        assert!(terminal.resumed.load(Ordering::SeqCst) > before);
        assert_eq!(frontend.receive(b"abc"), 3);
        drop(guest);
        assert_eq!(frontend.receive(b"abc"), 3);
    }

    #[test]
    fn hostile_rings_are_reported() {
        for queue in [RECEIVE, TRANSMIT] {
            let (mut guest, terminal) = guest(Transport::Pci);
            guest.submit(queue, &[(1 << 40, 4, queue == RECEIVE)]).unwrap();
            terminal.frontend().receive(b"abc");
            assert_ne!(guest.status() & 64, 0);
            assert_eq!(terminal.frontend().receive(b"abc"), 0);
        }
    }
}
