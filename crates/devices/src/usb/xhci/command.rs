//! Commands (xHCI 1.2, 4.6).

use super::core::{Core, ENDPOINTS, Endpoint, EndpointState, SLOTS, Slot};
use super::memory::{Context, Ring, Trb, code, kind};
use super::transfer::MOST_AT_ONCE;
use crate::usb::Setup;

/// State of a slot in its context (xHCI 1.2, 6.2.2).
const SLOT_DEFAULT: u32 = 1;
const SLOT_ADDRESSED: u32 = 2;
const SLOT_CONFIGURED: u32 = 3;
const SLOT_STATE: u32 = 0xf800_0000;

impl Core {
    pub(super) fn run_commands(&mut self) {
        self.s.commands_run = true;
        let memory = self.memory.clone();
        for _ in 0..MOST_AT_ONCE {
            if !self.s.commands_run {
                return;
            }
            let Some((at, trb)) = self.command_ring().next(&memory) else { return };
            let (result, slot) = self.run_command(&trb);
            let control = kind::COMMAND_COMPLETION << 10 | u32::from(slot) << 24;
            self.event(0, Trb { parameter: at, status: result << 24, control });
        }
        self.fail("the command ring has no end");
    }

    /// Returns the completion code, and the slot that it is about.
    fn run_command(&mut self, trb: &Trb) -> (u32, u8) {
        let slot = trb.slot();
        let n = usize::from(slot);
        if trb.kind() == kind::NO_OP_COMMAND {
            return (code::SUCCESS, 0);
        }
        if trb.kind() == kind::ENABLE_SLOT {
            let most = (self.s.config as usize & 0xff).min(SLOTS);
            let Some(free) = (1..=most).find(|n| !self.s.slots[*n].enabled) else {
                return (code::NO_SLOTS, 0);
            };
            self.s.slots[free] = Slot { enabled: true, ..Slot::default() };
            return (code::SUCCESS, free as u8);
        }
        if !(1..=SLOTS).contains(&n) || !self.s.slots[n].enabled {
            return (code::SLOT_NOT_ENABLED, slot);
        }
        let endpoint = (trb.control >> 16 & 0x1f) as usize;
        let result = match trb.kind() {
            kind::DISABLE_SLOT => {
                self.s.slots[n] = Slot::default();
                Ok(())
            }
            kind::ADDRESS_DEVICE => self.address_device(n, trb),
            kind::CONFIGURE_ENDPOINT => self.configure_endpoint(n, trb),
            kind::EVALUATE_CONTEXT => self.evaluate_context(n, trb),
            kind::RESET_ENDPOINT => self.reset_endpoint(n, endpoint),
            kind::STOP_ENDPOINT => self.stop_endpoint(n, endpoint),
            kind::SET_DEQUEUE => self.set_dequeue(n, endpoint, trb),
            kind::RESET_DEVICE => self.reset_device(n),
            _ => Err(code::TRB_ERROR),
        };
        (result.err().unwrap_or(code::SUCCESS), slot)
    }

    fn input(&self, trb: &Trb, index: u64) -> Result<Context, u32> {
        let at = (trb.parameter & !0xf).checked_add(index * Context::LENGTH).ok_or(code::PARAMETER_ERROR)?;
        Context::load(&self.memory, at).ok_or(code::PARAMETER_ERROR)
    }

    fn context_at(&self, slot: usize, index: usize) -> u64 {
        self.s.slots[slot].context.wrapping_add(index as u64 * Context::LENGTH)
    }

    fn output(&self, slot: usize, index: usize) -> Result<Context, u32> {
        Context::load(&self.memory, self.context_at(slot, index)).ok_or(code::PARAMETER_ERROR)
    }

    fn put_output(&self, slot: usize, index: usize, context: &Context) {
        context.store(&self.memory, self.context_at(slot, index));
    }

    fn enable_endpoint(&mut self, slot: usize, index: usize, mut context: Context) {
        let pointer = u64::from(context.0[2]) | u64::from(context.0[3]) << 32;
        let ring = Ring::new(pointer);
        self.s.slots[slot].endpoints[index] = Endpoint { state: EndpointState::Running, ring, waits: false };
        context.set(0, 7, EndpointState::Running as u32);
        self.put_output(slot, index, &context);
    }

    fn address_device(&mut self, slot: usize, trb: &Trb) -> Result<(), u32> {
        const BLOCK: u32 = 1 << 9;
        let control = self.input(trb, 0)?;
        if control.0[1] & 3 != 3 || control.0[0] != 0 {
            return Err(code::PARAMETER_ERROR);
        }
        let (mut s, e) = (self.input(trb, 1)?, self.input(trb, 2)?);
        let pointer = self.s.contexts.wrapping_add(8 * slot as u64);
        let context = self.memory.read_obj::<u64>(pointer).map_err(|_| code::PARAMETER_ERROR)? & !0x3f;
        let port = (s.0[1] >> 16) as u8;
        {
            let slot = &mut self.s.slots[slot];
            (slot.context, slot.port, slot.route) = (context, port, s.0[0] & 0xf_ffff);
        }
        let enabled = self.s.ports.get(usize::from(port).wrapping_sub(1)).is_some_and(|p| p.is_enabled());
        if !enabled || self.device(slot).is_none() {
            return Err(code::TRANSACTION_ERROR);
        }
        let set_address = trb.control & BLOCK == 0;
        let state = if set_address { SLOT_ADDRESSED } else { SLOT_DEFAULT };
        if set_address {
            let setup = Setup { request: 5, value: slot as u16, index: 0, length: 0 };
            if let Some(device) = self.device(slot) {
                device.control(setup, &mut Vec::new());
            }
        }
        self.s.slots[slot].addressed = set_address;
        s.set(3, SLOT_STATE | 0xff, state << 27 | if set_address { slot as u32 } else { 0 });
        self.put_output(slot, 0, &s);
        self.enable_endpoint(slot, 1, e);
        Ok(())
    }

    fn configure_endpoint(&mut self, slot: usize, trb: &Trb) -> Result<(), u32> {
        const DECONFIGURE: u32 = 1 << 9;
        if !self.s.slots[slot].addressed {
            return Err(code::CONTEXT_STATE);
        }
        let mut s = self.output(slot, 0)?;
        if trb.control & DECONFIGURE != 0 {
            for e in 2..ENDPOINTS {
                self.disable_endpoint(slot, e);
            }
            s.set(0, 0xf800_0000, 1 << 27);
            s.set(3, SLOT_STATE, SLOT_ADDRESSED << 27);
            self.put_output(slot, 0, &s);
            return Ok(());
        }
        let control = self.input(trb, 0)?;
        let (drop, add) = (control.0[0], control.0[1]);
        if drop & 3 != 0 || add & 2 != 0 {
            return Err(code::PARAMETER_ERROR);
        }
        let new = if add & 1 != 0 { self.input(trb, 1)? } else { s };
        for e in 2..ENDPOINTS {
            if drop >> e & 1 != 0 {
                self.disable_endpoint(slot, e);
            }
            if add >> e & 1 != 0 {
                let context = self.input(trb, 1 + e as u64)?;
                self.enable_endpoint(slot, e, context);
            }
        }
        let used =
            (2..ENDPOINTS).rev().find(|e| self.s.slots[slot].endpoints[*e].state != EndpointState::Disabled);
        let state = if used.is_some() { SLOT_CONFIGURED } else { SLOT_ADDRESSED };
        s.set(0, 0xfe00_0000, new.0[0]);
        s.set(1, 0xff00_0000, new.0[1]);
        s.set(0, 0xf800_0000, (used.unwrap_or(1) as u32) << 27);
        s.set(3, SLOT_STATE, state << 27);
        self.put_output(slot, 0, &s);
        Ok(())
    }

    fn disable_endpoint(&mut self, slot: usize, endpoint: usize) {
        if self.s.slots[slot].endpoints[endpoint].state != EndpointState::Disabled {
            self.s.slots[slot].endpoints[endpoint] = Endpoint::default();
            self.store_endpoint_state(slot, endpoint);
        }
    }

    fn evaluate_context(&mut self, slot: usize, trb: &Trb) -> Result<(), u32> {
        let control = self.input(trb, 0)?;
        if control.0[0] != 0 || control.0[1] & !3 != 0 {
            return Err(code::PARAMETER_ERROR);
        }
        if control.0[1] & 1 != 0 {
            let (new, mut s) = (self.input(trb, 1)?, self.output(slot, 0)?);
            s.set(1, 0xffff, new.0[1]); // latency
            s.set(2, 0xffc0_0000, new.0[2]); // interrupter
            self.put_output(slot, 0, &s);
        }
        if control.0[1] & 2 != 0 {
            let (new, mut e) = (self.input(trb, 2)?, self.output(slot, 1)?);
            e.set(1, 0xffff_0000, new.0[1]); // packet size
            self.put_output(slot, 1, &e);
        }
        Ok(())
    }

    /// Writes an endpoint's state and place into its context.
    pub(super) fn store_endpoint_state(&self, slot: usize, endpoint: usize) {
        let e = self.s.slots[slot].endpoints[endpoint];
        if let Ok(mut context) = self.output(slot, endpoint) {
            context.set(0, 7, e.state as u32);
            let pointer = e.ring.pointer();
            (context.0[2], context.0[3]) = (pointer as u32, (pointer >> 32) as u32);
            self.put_output(slot, endpoint, &context);
        }
    }

    fn endpoint(&mut self, slot: usize, endpoint: usize) -> Result<&mut Endpoint, u32> {
        let e = &mut self.s.slots[slot].endpoints[endpoint];
        if endpoint == 0 || e.state == EndpointState::Disabled {
            Err(code::ENDPOINT_NOT_ENABLED)
        } else {
            Ok(e)
        }
    }

    fn reset_endpoint(&mut self, slot: usize, endpoint: usize) -> Result<(), u32> {
        let e = self.endpoint(slot, endpoint)?;
        if e.state != EndpointState::Halted {
            return Err(code::CONTEXT_STATE);
        }
        e.state = EndpointState::Stopped;
        self.store_endpoint_state(slot, endpoint);
        Ok(())
    }

    fn stop_endpoint(&mut self, slot: usize, endpoint: usize) -> Result<(), u32> {
        let e = self.endpoint(slot, endpoint)?;
        if e.state != EndpointState::Running {
            return Err(code::CONTEXT_STATE);
        }
        let waited = std::mem::take(&mut e.waits);
        e.state = EndpointState::Stopped;
        let at = e.ring.at;
        self.store_endpoint_state(slot, endpoint);
        if waited {
            // The transfer that waits is reported as stopped.
            let control = kind::TRANSFER_EVENT << 10 | (slot as u32) << 24 | (endpoint as u32) << 16;
            let residue = Trb::load(&self.memory, at).map_or(0, |t| t.length());
            self.event(0, Trb { parameter: at, status: code::STOPPED << 24 | residue, control });
        }
        Ok(())
    }

    fn set_dequeue(&mut self, slot: usize, endpoint: usize, trb: &Trb) -> Result<(), u32> {
        let e = self.endpoint(slot, endpoint)?;
        if !matches!(e.state, EndpointState::Stopped | EndpointState::Error) {
            return Err(code::CONTEXT_STATE);
        }
        e.state = EndpointState::Stopped;
        e.ring = Ring::new(trb.parameter);
        e.waits = false;
        self.store_endpoint_state(slot, endpoint);
        Ok(())
    }

    fn reset_device(&mut self, slot: usize) -> Result<(), u32> {
        for e in 2..ENDPOINTS {
            self.disable_endpoint(slot, e);
        }
        self.s.slots[slot].addressed = false;
        let mut s = self.output(slot, 0)?;
        s.set(0, 0xf800_0000, 1 << 27);
        s.set(3, SLOT_STATE | 0xff, SLOT_DEFAULT << 27);
        self.put_output(slot, 0, &s);
        Ok(())
    }
}
