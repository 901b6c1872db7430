//! Looking into a machine: registers, memory by physical and by linear address.

use crate::{Error, Machine, Result};
use accel::state::Events;
use accel::{CpuState, Vcpu};
use bus::Bus;
use memory::GuestMemory;
use std::sync::Arc;

/// Present bit of a page-table entry.
const PRESENT: u64 = 1;
/// Page-size bit.
const LARGE: u64 = 1 << 7;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// The page that a linear address is in, as the vCPU's tables say now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Guest physical address of the address asked for.
    pub gpa: u64,
    /// Page-table entry that maps it; `None` without paging.
    pub entry: Option<u64>,
    /// Size of the page in bytes.
    pub size: u64,
}

/// Walks the page tables (Intel SDM volume 3, 4.3-4.5). `None` if a level is not present or lies outside RAM.
pub fn translate(memory: &GuestMemory, cpu: &CpuState, linear: u64) -> Option<Mapping> {
    if cpu.cr0 & CR0_PG == 0 {
        return Some(Mapping { gpa: linear & 0xffff_ffff, entry: None, size: 4096 });
    }
    if cpu.cr4 & CR4_PAE == 0 {
        return translate_32(memory, cpu, linear as u32);
    }
    let (mut table, levels) = if cpu.efer & EFER_LMA == 0 {
        let pdpte: u64 = memory.read_obj((cpu.cr3 & !0x1f) + (linear >> 30 & 3) * 8).ok()?;
        if pdpte & PRESENT == 0 {
            return None;
        }
        (pdpte, 2)
    } else {
        (cpu.cr3, if cpu.cr4 & CR4_LA57 != 0 { 5 } else { 4 })
    };
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry: u64 = memory.read_obj((table & ADDRESS) + (linear >> shift & 0x1ff) * 8).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if level == 0 || (entry & LARGE != 0 && level <= 2) {
            let size = 1u64 << shift;
            return Some(Mapping {
                gpa: (entry & ADDRESS & !(size - 1)) | (linear & (size - 1)),
                entry: Some(entry),
                size,
            });
        }
        table = entry;
    }
    None
}

/// Address bits of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

fn translate_32(memory: &GuestMemory, cpu: &CpuState, linear: u32) -> Option<Mapping> {
    let linear = u64::from(linear);
    let pde: u32 = memory.read_obj((cpu.cr3 & 0xffff_f000) + (linear >> 22) * 4).ok()?;
    let pde = u64::from(pde);
    if pde & PRESENT == 0 {
        return None;
    }
    if pde & LARGE != 0 && cpu.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 13..20 are bits 32..39 of the address.
        let high = (pde >> 13 & 0xff) << 32;
        let gpa = high | (pde & 0xffc0_0000) | (linear & 0x3f_ffff);
        return Some(Mapping { gpa, entry: Some(pde), size: 4 << 20 });
    }
    let pte: u32 = memory.read_obj((pde & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4).ok()?;
    let pte = u64::from(pte);
    (pte & PRESENT != 0).then_some(Mapping {
        gpa: (pte & 0xffff_f000) | (linear & 0xfff),
        entry: Some(pte),
        size: 4096,
    })
}

impl Machine {
    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.vcpus().len() as u32
    }

    /// The host's id of a vCPU's thread.
    pub fn vcpu_thread(&self, index: u32) -> Option<i32> {
        Some(self.vcpus().get(index as usize)?.thread_id())
    }

    /// Does something with a vCPU, on its thread, between two instructions.
    ///
    /// # Errors
    /// There is no such vCPU, or what `f` says.
    pub fn with_vcpu<R: Send + 'static>(
        &self,
        index: u32,
        f: impl FnOnce(&mut dyn Vcpu) -> accel::Result<R> + Send + 'static,
    ) -> Result<R> {
        let thread = self.vcpus().get(index as usize);
        let thread = thread.ok_or_else(|| Error::Config(format!("there is no vCPU {index}")))?;
        let result = thread.visit(f);
        Ok(result.ok_or_else(|| Error::Config(format!("vCPU {index} has ended")))??)
    }

    /// General, segment and control registers of a vCPU.
    ///
    /// # Errors
    /// As for [`Self::with_vcpu`].
    pub fn registers(&self, index: u32) -> Result<CpuState> {
        self.with_vcpu(index, |vcpu| vcpu.save_registers())
    }

    /// Everything there is to know of a vCPU.
    ///
    /// # Errors
    /// As for [`Self::with_vcpu`].
    pub fn cpu_state(&self, index: u32) -> Result<CpuState> {
        self.with_vcpu(index, |vcpu| vcpu.save())
    }

    /// Sends a non-maskable interrupt to every vCPU.
    ///
    /// # Errors
    /// As for [`Self::with_vcpu`].
    pub fn inject_nmi(&self) -> Result<()> {
        for index in 0..self.vcpu_count() {
            self.with_vcpu(index, |vcpu| {
                let mut state = vcpu.save()?;
                if state.mp_state == accel::state::MpState::Halted {
                    state.mp_state = accel::state::MpState::Runnable;
                }
                state.events = Events { nmi_pending: true, ..state.events };
                vcpu.load(&state)
            })?;
        }
        Ok(())
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.built().memory
    }

    /// The port and memory buses.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.built().bus
    }

    /// Reads or writes guest memory by linear address, page by page, as the vCPU whose registers `cpu` holds sees it.
    ///
    /// # Errors
    /// The first address that is not mapped to RAM.
    pub fn linear(
        &self,
        cpu: &CpuState,
        address: u64,
        mut access: Access<'_>,
    ) -> std::result::Result<(), u64> {
        let total = access.len();
        let mut done = 0;
        while done < total {
            let at = address.wrapping_add(done as u64);
            let n = ((4096 - (at & 0xfff)) as usize).min(total - done);
            let gpa = translate(self.memory(), cpu, at).ok_or(at)?.gpa;
            let range = done..done + n;
            match &mut access {
                Access::Read(buf) => self.memory().read(gpa, &mut buf[range]),
                Access::Write(buf) => self.memory().write(gpa, &buf[range]),
            }
            .map_err(|_| at)?;
            done += n;
        }
        Ok(())
    }
}

/// What [`Machine::linear`] does.
pub enum Access<'a> {
    /// Reads into this.
    Read(&'a mut [u8]),
    /// Writes this.
    Write(&'a [u8]),
}

impl Access<'_> {
    fn len(&self) -> usize {
        match self {
            Access::Read(b) => b.len(),
            Access::Write(b) => b.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::{Backing, Layout};

    fn memory() -> GuestMemory {
        let layout = Layout::pc(16 << 20, 3 << 30).unwrap();
        GuestMemory::new(&layout, &Backing::Anonymous, false).unwrap()
    }

    fn put(m: &GuestMemory, at: u64, entry: u64) {
        m.write_obj(at, &entry).unwrap();
    }

    #[test]
    fn long_mode_pages_of_all_sizes() {
        let m = memory();
        let cpu = CpuState {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: EFER_LMA | 1 << 8,
            ..Default::default()
        };
        put(&m, 0x1000, 0x2003);
        put(&m, 0x2000, 0x3003);
        put(&m, 0x2008, 0x4000_0083);
        put(&m, 0x3000, 0x4003);
        put(&m, 0x3008, 0x60_0083);
        put(&m, 0x4008, 0x8000_0000_0007_7003);
        assert_eq!(
            translate(&m, &cpu, 0x1234),
            Some(Mapping { gpa: 0x7_7234, entry: Some(0x8000_0000_0007_7003), size: 4096 })
        );
        assert_eq!(translate(&m, &cpu, 0x21_2345).map(|m| (m.gpa, m.size)), Some((0x61_2345, 2 << 20)));
        assert_eq!(translate(&m, &cpu, 0x4012_3456).map(|m| (m.gpa, m.size)), Some((0x4012_3456, 1 << 30)));
        assert_eq!(translate(&m, &cpu, 0x5000), None);
        assert_eq!(translate(&m, &cpu, 0xffff_8000_0000_0000), None);
    }

    #[test]
    fn legacy_paging_and_none() {
        let m = memory();
        let mut cpu = CpuState { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PSE, ..Default::default() };
        m.write_obj(0x1000, &0x2003u32).unwrap();
        m.write_obj(0x2004, &0x9003u32).unwrap();
        m.write_obj(0x1004, &0x0080_0083u32).unwrap();
        assert_eq!(translate(&m, &cpu, 0x1fff).map(|m| m.gpa), Some(0x9fff));
        assert_eq!(translate(&m, &cpu, 0x40_0010).map(|m| m.gpa), Some(0x80_0010));
        assert_eq!(translate(&m, &cpu, 0x3000), None);
        cpu.cr0 = 1;
        assert_eq!(translate(&m, &cpu, 0x3000).map(|m| m.gpa), Some(0x3000));
    }
}
