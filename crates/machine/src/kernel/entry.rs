//! The processor states in which kernels are entered.

use super::place;
use accel::state::{CpuState, Segment, Table, gpr, seg};
use memory::GuestMemory;

/// How the bootstrap processor enters what was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// At the reset vector, in real mode (firmware).
    Reset,
    /// 32-bit protected mode, paging off.
    Protected {
        /// Instruction pointer.
        ip: u64,
        /// ESI: boot parameters (Linux).
        esi: u64,
        /// EBX: start info (PVH).
        ebx: u64,
    },
    /// 64-bit mode, low 4 GiB (or all RAM, if more) identity-mapped.
    Long {
        /// Instruction pointer.
        ip: u64,
        /// RSI: boot parameters.
        rsi: u64,
    },
}

const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
const TSS: u32 = 0x008b;

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

fn flat(selector: u16, attributes: u32) -> Segment {
    Segment { selector, base: 0, limit: 0xffff_ffff, attributes }
}

impl Entry {
    /// Changes `state`, that of a processor after reset, into the entry state, and writes the descriptor and page
    /// tables it refers to.
    ///
    /// # Errors
    /// Low memory is missing.
    pub fn apply(&self, state: &mut CpuState, memory: &GuestMemory) -> memory::Result<()> {
        let (code, ip) = match *self {
            Entry::Reset => return Ok(()),
            Entry::Protected { ip, esi, ebx } => {
                state.gpr[gpr::RSI] = esi;
                state.gpr[gpr::RBX] = ebx;
                (CODE32, ip)
            }
            Entry::Long { ip, rsi } => {
                state.gpr[gpr::RSI] = rsi;
                (CODE64, ip)
            }
        };
        state.rip = ip;
        state.rflags = 2;
        state.gpr[gpr::RSP] = place::ZERO_PAGE;
        for s in &mut state.segments {
            *s = flat(BOOT_DS, DATA);
        }
        state.segments[seg::CS] = flat(BOOT_CS, code);
        state.tr = Segment { selector: 0, base: 0, limit: 0xffff, attributes: TSS };
        state.idtr = Table::default();
        state.gdtr = Table { base: place::GDT, limit: 4 * 8 - 1 };
        // Null, unused, __BOOT_CS, __BOOT_DS: flat segments.
        let descriptor = |attributes: u32| -> u64 {
            0x0000_ffff
                | (u64::from(attributes & 0xff) << 40)
                | (u64::from(attributes >> 8 & 0xf0 | 0xf) << 48)
        };
        for (i, d) in [0, 0, descriptor(code), descriptor(DATA)].into_iter().enumerate() {
            memory.write_obj(place::GDT + 8 * i as u64, &d)?;
        }
        const PE: u64 = 1;
        const ET: u64 = 1 << 4;
        const PG: u64 = 1 << 31;
        const PAE: u64 = 1 << 5;
        const LME_LMA: u64 = 1 << 8 | 1 << 10;
        state.cr0 = PE | ET;
        if let Entry::Long { .. } = self {
            identity_map(memory)?;
            state.cr3 = place::PAGE_TABLES;
            state.cr4 |= PAE;
            state.cr0 |= PG;
            state.efer |= LME_LMA;
        }
        Ok(())
    }
}

/// Identity-maps the first 4 GiB with 2 MiB pages: what a kernel, its parameters and its initramfs may lie in.
fn identity_map(memory: &GuestMemory) -> memory::Result<()> {
    const PRESENT_WRITE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (place::PAGE_TABLES, place::PAGE_TABLES + 0x1000, place::PAGE_TABLES + 0x2000);
    let mut table = [0u64; 512];
    table[0] = pdpt | PRESENT_WRITE;
    memory.write_obj(pml4, &table)?;
    table = [0; 512];
    for (i, entry) in table.iter_mut().take(4).enumerate() {
        *entry = (pd + 0x1000 * i as u64) | PRESENT_WRITE;
    }
    memory.write_obj(pdpt, &table)?;
    for gib in 0..4u64 {
        for (i, entry) in table.iter_mut().enumerate() {
            *entry = (gib << 30 | (i as u64) << 21) | PRESENT_WRITE | LARGE;
        }
        memory.write_obj(pd + 0x1000 * gib, &table)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::{Backing, Layout};

    #[test]
    fn long_mode_state_matches_its_tables() {
        let m = GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &Backing::Anonymous, false).unwrap();
        let mut s = CpuState::default();
        Entry::Long { ip: 0x10_0200, rsi: 0x7000 }.apply(&mut s, &m).unwrap();
        assert_eq!((s.rip, s.gpr[gpr::RSI]), (0x10_0200, 0x7000));
        assert_eq!(m.read_obj::<u64>(place::GDT + u64::from(BOOT_CS)).unwrap(), 0x00af_9b00_0000_ffff);
        assert_eq!(m.read_obj::<u64>(place::GDT + u64::from(BOOT_DS)).unwrap(), 0x00cf_9300_0000_ffff);
        // The walk of 0xfee0_0000: PML4[0], PDPT[3], PD[0x1f7].
        let pdpt = m.read_obj::<u64>(s.cr3).unwrap() & !0xfff;
        let pd = m.read_obj::<u64>(pdpt + 3 * 8).unwrap() & !0xfff;
        assert_eq!(m.read_obj::<u64>(pd + 0x1f7 * 8).unwrap(), 0xfee0_0083);
    }
}
