//! Tests of queues and transports, with a device that copies what it reads to what it writes.

mod queue;
mod transport;

use super::{Activation, Chain, Interrupt, QueueError, SharedQueue, VirtioDevice, feature};
use crate::{State, StateError};
use base::EventFd;
use memory::GuestMemory;
use std::io;

/// Copies each request's readable bytes to its writable ones. Configuration: four bytes that can be written.
pub(super) struct Echo {
    features: u64,
    /// Hands out a doorbell, which is then served by the test through [`VirtioDevice::start`].
    doorbell: Option<EventFd>,
    running: bool,
    active: Option<(Vec<Option<SharedQueue>>, GuestMemory, Interrupt)>,
    config: [u8; 4],
}

impl Echo {
    pub(super) fn new(doorbell: bool) -> Box<Self> {
        Box::new(Self {
            features: feature::RING_DEFAULT | feature::RING_PACKED | 1,
            doorbell: doorbell.then(|| EventFd::new().unwrap()),
            running: false,
            active: None,
            config: [0; 4],
        })
    }

    fn process(&mut self, index: u16) {
        let Some((queues, memory, interrupt)) = self.active.as_ref().filter(|_| self.running) else { return };
        let Some(queue) = &queues[usize::from(index)] else { return };
        let mut queue = queue.lock().unwrap();
        let mut chain = Chain::new();
        let result = (|| {
            let mut batches = 0;
            loop {
                while queue.pop(&mut chain)? {
                    let written = echo(&chain, memory)?;
                    queue.push(&chain, written)?;
                }
                batches += 1;
                if !queue.enable_notifications()? || batches == 4 {
                    return queue.publish();
                }
            }
        })();
        match result {
            Ok(true) => interrupt.queue(index),
            Ok(false) | Err(QueueError::Broken) => {}
            Err(e) => interrupt.fail(&e.to_string()),
        }
    }
}

/// Copies what there is room for; returns how much.
pub(super) fn echo(chain: &Chain, memory: &GuestMemory) -> Result<u32, QueueError> {
    let (mut reader, mut writer) = (chain.reader(memory), chain.writer(memory));
    let mut buffer = [0; 7];
    // A hostile chain may be as long as 4 GiB.
    while writer.written() < 1 << 16 {
        let n = (buffer.len() as u64).min(writer.remaining()) as usize;
        let n = reader.read(&mut buffer[..n])?;
        if n == 0 {
            break;
        }
        assert_eq!(writer.write(&buffer[..n])?, n);
    }
    Ok(writer.written())
}

impl VirtioDevice for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 32]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = usize::try_from(offset).ok().and_then(|o| self.config.get(o + i)).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(c) = self.config.get_mut(offset as usize + i) {
                *c = *byte;
            }
        }
        if let Some((_, _, interrupt)) = &self.active {
            interrupt.config_changed();
        }
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        assert!(self.active.is_none(), "activated twice");
        self.active = Some((activation.queues, activation.memory, activation.interrupt));
        if self.running {
            self.start()?;
        }
        Ok(())
    }
    fn doorbell(&self, _: u16) -> Option<&EventFd> {
        self.doorbell.as_ref()
    }
    fn notify(&mut self, queue: u16) {
        self.process(queue);
    }
    fn reset(&mut self) {
        self.active = None;
    }
    fn start(&mut self) -> io::Result<()> {
        self.running = true;
        for queue in 0..2 {
            self.process(queue);
        }
        Ok(())
    }
    fn pause(&mut self) -> io::Result<()> {
        self.running = false;
        Ok(())
    }
    fn save(&self) -> Result<State, StateError> {
        State::new("echo", 1, &self.config)
    }
    fn load(&mut self, state: State) -> Result<(), StateError> {
        self.config = state.unpack("echo", 1)?;
        Ok(())
    }
}
