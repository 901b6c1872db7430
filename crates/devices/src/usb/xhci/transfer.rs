//! Transfers (xHCI 1.2, 4.10, 4.11).

use super::core::{Core, EndpointState};
use super::memory::{Trb, code, kind};
use crate::usb::{Outcome, Setup};

/// Most transfers or commands in one go.
pub(super) const MOST_AT_ONCE: usize = 256;
/// Most TRBs of a transfer.
const MOST_TRBS: usize = 256;
/// Most bytes of a transfer.
const MOST_BYTES: usize = 8 << 20;

/// A transfer: its TRBs and where they are.
struct Transfer {
    trbs: Vec<(u64, Trb)>,
}

impl Transfer {
    /// The pieces that carry data.
    fn pieces(&self) -> impl Iterator<Item = &(u64, Trb)> {
        self.trbs.iter().filter(|(_, t)| matches!(t.kind(), kind::NORMAL | kind::DATA | kind::ISOCH))
    }

    fn length(&self) -> usize {
        self.pieces().map(|(_, t)| t.length() as usize).sum()
    }
}

impl Core {
    /// Does an endpoint's transfers until there is none or the device has nothing.
    pub(super) fn run_endpoint(&mut self, slot: usize, endpoint: usize) {
        if !self.is_running() {
            return;
        }
        for _ in 0..MOST_AT_ONCE {
            let e = self.s.slots[slot].endpoints[endpoint];
            if e.state != EndpointState::Running {
                return;
            }
            let mut ring = e.ring;
            let transfer = match self.gather(&mut ring, endpoint) {
                Ok(Some(transfer)) => transfer,
                Ok(None) => {
                    self.s.slots[slot].endpoints[endpoint].waits = false;
                    return;
                }
                Err(()) => {
                    self.halt(slot, endpoint, EndpointState::Error, (e.ring.at, code::TRB_ERROR, 0));
                    return;
                }
            };
            match self.execute(slot, endpoint, &transfer) {
                // It stays on the ring.
                None => {
                    self.s.slots[slot].endpoints[endpoint].waits = true;
                    return;
                }
                Some((code::SUCCESS, moved)) => {
                    let e = &mut self.s.slots[slot].endpoints[endpoint];
                    (e.ring, e.waits) = (ring, false);
                    self.complete(slot, endpoint, &transfer, moved);
                }
                Some((error, _)) => {
                    let at = transfer.trbs.last().map_or(0, |(at, _)| *at);
                    self.halt(slot, endpoint, EndpointState::Halted, (at, error, transfer.length() as u32));
                    return;
                }
            }
        }
        // More than anyone queues at a time: the rest when the driver rings again, or the device wakes us.
        self.s.slots[slot].endpoints[endpoint].waits = true;
    }

    /// Takes a whole transfer off a ring; `None` if it is not all there yet.
    fn gather(&self, ring: &mut super::memory::Ring, endpoint: usize) -> Result<Option<Transfer>, ()> {
        let mut trbs = Vec::new();
        let mut bytes = 0;
        while let Some((at, trb)) = ring.next(&self.memory) {
            bytes += trb.length() as usize;
            if trbs.len() >= MOST_TRBS || bytes > MOST_BYTES {
                return Err(());
            }
            let kind = trb.kind();
            trbs.push((at, trb));
            let last = match (endpoint, kind) {
                // Setup, data and status are one transfer to us.
                (1, kind::STATUS) => !trb.has(Trb::CHAIN),
                (1, kind::EVENT_DATA) => trbs.iter().any(|(_, t)| t.kind() == kind::STATUS),
                (1, kind::NO_OP) => trbs.len() == 1,
                (1, _) => false,
                _ => !trb.has(Trb::CHAIN),
            };
            if last {
                return Ok(Some(Transfer { trbs }));
            }
        }
        Ok(None)
    }

    /// Performs a transfer: completion code and bytes moved, or `None` if the device has nothing now.
    fn execute(&mut self, slot: usize, endpoint: usize, transfer: &Transfer) -> Option<(u32, usize)> {
        if transfer.trbs.iter().all(|(_, t)| t.kind() == kind::NO_OP) {
            return Some((code::SUCCESS, 0));
        }
        if endpoint == 1 {
            return Some(self.control(slot, transfer));
        }
        let (number, is_in) = ((endpoint / 2) as u8, endpoint % 2 == 1);
        let most = transfer.length();
        let mut data = Vec::new();
        let outcome = if is_in {
            self.device(slot).map(|d| d.send(number, most, &mut data))
        } else {
            data = self.fetch(transfer)?;
            self.device(slot).map(|d| d.receive(number, &data))
        };
        match outcome {
            None => Some((code::TRANSACTION_ERROR, 0)),
            Some(Outcome::Nak) => None,
            Some(Outcome::Stall) => Some((code::STALL, 0)),
            Some(Outcome::Done(n)) => {
                if is_in {
                    data.truncate(most);
                    self.scatter(transfer, &data);
                }
                Some((code::SUCCESS, n.min(most)))
            }
        }
    }

    fn control(&mut self, slot: usize, transfer: &Transfer) -> (u32, usize) {
        let Some((_, first)) = transfer.trbs.first().filter(|(_, t)| t.kind() == kind::SETUP) else {
            return (code::TRB_ERROR, 0);
        };
        if !first.has(Trb::IMMEDIATE) || first.length() != 8 {
            return (code::TRB_ERROR, 0);
        }
        let setup = Setup::parse(first.parameter.to_le_bytes());
        let mut data = if setup.is_in() { Vec::new() } else { self.fetch(transfer).unwrap_or_default() };
        let outcome = self.device(slot).map(|d| d.control(setup, &mut data));
        match outcome {
            None => (code::TRANSACTION_ERROR, 0),
            Some(Outcome::Done(_)) => {
                if setup.is_in() {
                    data.truncate(transfer.length().min(setup.length.into()));
                    self.scatter(transfer, &data);
                }
                (code::SUCCESS, data.len())
            }
            Some(_) => (code::STALL, 0),
        }
    }

    /// The data that the guest sends.
    fn fetch(&self, transfer: &Transfer) -> Option<Vec<u8>> {
        let mut data = Vec::with_capacity(transfer.length());
        for (_, trb) in transfer.pieces() {
            let n = trb.length() as usize;
            if trb.has(Trb::IMMEDIATE) {
                data.extend_from_slice(&trb.parameter.to_le_bytes()[..n.min(8)]);
                continue;
            }
            let start = data.len();
            data.resize(start + n, 0);
            if let Err(e) = self.memory.read(trb.parameter, &mut data[start..]) {
                tracing::debug!("xHCI: transfer from {:#x}: {e}", trb.parameter);
            }
        }
        Some(data)
    }

    /// Puts data where the guest wants it.
    fn scatter(&self, transfer: &Transfer, mut data: &[u8]) {
        for (_, trb) in transfer.pieces() {
            let (now, rest) = data.split_at(data.len().min(trb.length() as usize));
            if let Err(e) = self.memory.write(trb.parameter, now) {
                tracing::debug!("xHCI: transfer to {:#x}: {e}", trb.parameter);
            }
            data = rest;
        }
    }

    /// Reports a transfer that went well, perhaps with less data than there was room for.
    fn complete(&mut self, slot: usize, endpoint: usize, transfer: &Transfer, moved: usize) {
        let mut left = moved;
        let mut summed = 0u32;
        let mut short_reported = false;
        let mut code_now = code::SUCCESS;
        for (at, trb) in &transfer.trbs {
            let carries = matches!(trb.kind(), kind::NORMAL | kind::DATA | kind::ISOCH);
            let mut residue = 0;
            if carries {
                let n = left.min(trb.length() as usize);
                left -= n;
                summed += n as u32; // at most 8 MiB
                residue = trb.length() - n as u32;
                code_now = if residue > 0 { code::SHORT_PACKET } else { code::SUCCESS };
            }
            let interrupter = trb.status >> 22;
            let control = kind::TRANSFER_EVENT << 10 | (slot as u32) << 24 | (endpoint as u32) << 16;
            if trb.kind() == kind::EVENT_DATA {
                if trb.has(Trb::IOC) {
                    let status = code_now << 24 | summed & 0xff_ffff;
                    self.event(interrupter, Trb { parameter: trb.parameter, status, control: control | 4 });
                }
                summed = 0;
                continue;
            }
            let short = carries && residue > 0;
            let wanted = trb.has(Trb::IOC) || short && trb.has(Trb::SHORT) && !short_reported;
            if wanted && !(carries && short_reported && residue == trb.length()) {
                let result = if short { code::SHORT_PACKET } else { code::SUCCESS };
                self.event(interrupter, Trb { parameter: *at, status: result << 24 | residue, control });
            }
            short_reported |= short;
        }
    }

    /// Reports an error; the endpoint stops until the driver has dealt with it.
    fn halt(
        &mut self,
        slot: usize,
        endpoint: usize,
        state: EndpointState,
        (at, result, residue): (u64, u32, u32),
    ) {
        {
            let e = &mut self.s.slots[slot].endpoints[endpoint];
            (e.state, e.waits) = (state, false);
        }
        self.store_endpoint_state(slot, endpoint);
        let control = kind::TRANSFER_EVENT << 10 | (slot as u32) << 24 | (endpoint as u32) << 16;
        self.event(0, Trb { parameter: at, status: result << 24 | residue & 0xff_ffff, control });
    }
}
