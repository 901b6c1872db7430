//! Graphics adapter in two dimensions (virtio 1.2, 5.7).

mod adapter;
mod command;
mod resource;
mod source;
#[cfg(test)]
mod tests;

use super::{RingSpec, VirtioDevice, read_structure};
use crate::display::edid::{Monitor, edid};
use crate::model::{CreateError, Kind, Model, Parts};
use adapter::{Adapter, MOST_HEADS, Saved};
use base::props::{Bag, Properties};
use bus::virtio::{Activation, Chain, QueueError, SharedQueue, device_id};
use bus::{State, StateError};
use memory::GuestMemory;
use schemars::JsonSchema;
use serde::Deserialize;
use source::Head;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// The model.
pub const MODEL: Model = Model {
    name: "virtio-gpu",
    about: "virtio graphics adapter (2D)",
    properties: Properties::of::<Spec>,
    kind: Kind::Virtio(|bag, parts| create(bag, parts)),
};

/// Properties of `virtio-gpu`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Spec {
    /// Number of screens (1 to 16).
    pub max_outputs: u32,
    /// Preferred width of the first screen.
    pub xres: u32,
    /// Preferred height of the first screen.
    pub yres: u32,
    /// Tell the guest of the monitors (EDID).
    pub edid: bool,
    /// Memory of the host that the guest's pictures may take, in bytes or with a suffix.
    #[schemars(extend("format" = "size"))]
    pub max_hostmem: u64,
    /// Ring features.
    #[serde(flatten)]
    pub ring: RingSpec,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            max_outputs: 1,
            xres: 1280,
            yres: 800,
            edid: true,
            max_hostmem: 256 << 20,
            ring: RingSpec::default(),
        }
    }
}

fn create(bag: &Bag, parts: &mut dyn Parts) -> Result<Box<dyn VirtioDevice>, CreateError> {
    let spec: Spec = bag.spec()?;
    let wrong = |text: &str| Err(CreateError::Other(format!("virtio-gpu: {text}")));
    if !(1..=MOST_HEADS as u32).contains(&spec.max_outputs) {
        return wrong("max_outputs= is 1 to 16");
    }
    if !(64..=16384).contains(&spec.xres) || !(64..=16384).contains(&spec.yres) {
        return wrong("xres= and yres= are 64 to 16384");
    }
    let displays = parts.displays()?;
    let gpu = Gpu::new(&spec);
    for index in 0..spec.max_outputs as usize {
        let name = if index == 0 { "virtio-gpu".to_owned() } else { format!("virtio-gpu.{index}") };
        let console = displays.add(&name, Arc::new(Head::new(gpu.adapter.clone(), index)));
        gpu.lock().set_console(index, console);
    }
    Ok(Box::new(gpu))
}

const CONTROL_QUEUE: u16 = 0;
const F_EDID: u64 = 1 << 1;

/// The device.
pub struct Gpu {
    ring: RingSpec,
    edid: bool,
    adapter: Arc<Mutex<Adapter>>,
    queues: Vec<Option<SharedQueue>>,
    memory: Option<GuestMemory>,
    running: bool,
    chain: Chain,
}

impl Gpu {
    /// A device with the properties of `spec`; its consoles are set by the caller.
    fn new(spec: &Spec) -> Self {
        let adapter = Adapter::new(spec.max_outputs as usize, (spec.xres, spec.yres), spec.max_hostmem);
        Self {
            ring: spec.ring.clone(),
            edid: spec.edid,
            adapter: Arc::new(Mutex::new(adapter)),
            queues: Vec::new(),
            memory: None,
            running: false,
            chain: Chain::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Adapter> {
        self.adapter.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Serves a queue, at most a ringful.
    fn process(&mut self, index: u16) {
        if !self.running {
            return;
        }
        let Some(queue) = self.queues.get(usize::from(index)).cloned().flatten() else { return };
        let Some(memory) = self.memory.clone() else { return };
        let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
        if queue.is_broken() {
            return;
        }
        let adapter = self.adapter.clone();
        let mut adapter = adapter.lock().unwrap_or_else(|e| e.into_inner());
        let chain = &mut self.chain;
        let result = (|| {
            for _ in 0..queue.size() {
                if !queue.pop_or_listen(chain)? {
                    break;
                }
                let written = serve(&mut adapter, chain, &memory)?;
                queue.push(chain, written)?;
            }
            queue.publish()
        })();
        if let Some(interrupt) = adapter.interrupt() {
            match result {
                Ok(true) => interrupt.queue(index),
                Ok(false) => {}
                Err(e) => interrupt.fail(&format!("queue {index}: {e}")),
            }
        }
        let consoles = adapter.take_kicks();
        drop(adapter);
        consoles.iter().for_each(|c| c.kick());
    }
}

fn serve(adapter: &mut Adapter, chain: &Chain, memory: &GuestMemory) -> Result<u32, QueueError> {
    let mut reader = chain.reader(memory);
    let mut fetch = |buf: &mut [u8]| {
        if reader.read(buf)? == buf.len() { Ok(()) } else { Err(QueueError::TooShort) }
    };
    let answer = command::run(adapter, &mut fetch, memory)?;
    let mut writer = chain.writer(memory);
    writer.write(&answer)?;
    Ok(writer.written())
}

impl VirtioDevice for Gpu {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn device_id(&self) -> u32 {
        device_id::GPU
    }

    fn features(&self) -> u64 {
        self.ring.features() | if self.edid { F_EDID } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let adapter = self.lock();
        let config: Vec<u8> =
            [adapter.events(), 0, adapter.heads() as u32, 0].iter().flat_map(|n| n.to_le_bytes()).collect();
        read_structure(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // events_clear
        if let (4, Ok(raw)) = (offset, data.try_into()) {
            self.lock().clear_events(u32::from_le_bytes(raw));
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { queues, memory, interrupt, .. } = activation;
        self.queues = queues;
        self.memory = Some(memory);
        self.lock().set_interrupt(Some(interrupt));
        Ok(())
    }

    fn notify(&mut self, queue: u16) {
        self.process(queue);
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.memory = None;
        let consoles = {
            let mut adapter = self.lock();
            adapter.reset();
            adapter.take_kicks()
        };
        consoles.iter().for_each(|c| c.kick());
    }

    fn start(&mut self) -> io::Result<()> {
        self.running = true;
        for queue in CONTROL_QUEUE..2 {
            self.process(queue);
        }
        Ok(())
    }

    fn pause(&mut self) -> io::Result<()> {
        self.running = false;
        Ok(())
    }

    fn save(&self) -> Result<State, StateError> {
        State::new(self.name(), 1, &self.lock().save())
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(self.name(), 1)?;
        self.lock()
            .load(saved)
            .map_err(|reason| StateError::Invalid { kind: self.name().into(), reason: reason.into() })
    }
}

/// What a head's monitor says of itself.
fn monitor(size: (u32, u32), head: usize) -> [u8; 256] {
    edid(Monitor { width: size.0, height: size.1, head: head as u32 })
}
