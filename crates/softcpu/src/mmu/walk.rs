//! Page-table walks (Intel SDM vol. 3, chapter 5).

use super::{Access, PAGE_MASK, Privilege};
use crate::state::{Cpu, cr};

/// Page-fault error code bits.
pub mod pf {
    /// The page was present.
    pub const P: u32 = 1;
    /// Write.
    pub const W: u32 = 2;
    /// From CPL 3.
    pub const U: u32 = 4;
    /// Reserved bit set in an entry.
    pub const RSVD: u32 = 8;
    /// Instruction fetch.
    pub const I: u32 = 16;
}

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// A finished walk.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Physical address of the 4 KiB page.
    pub page: u64,
    /// It may be written now without another walk: permitted, and the dirty bit is set.
    pub writable: bool,
    /// Global.
    pub global: bool,
    /// log2 of the size, of a large page.
    pub large: Option<u32>,
}

/// Why an entry ended a walk, as error code bits; the walk adds the access's own.
struct Stop(u32);

/// The permissions gathered on the way down.
#[derive(Clone, Copy)]
struct Rights {
    write: bool,
    user: bool,
    exec: bool,
}

impl Cpu {
    /// Translates a (canonical) linear address. On failure returns the page-fault error code.
    pub(super) fn walk(&self, lin: u64, access: Access, privilege: Privilege) -> Result<Walk, u32> {
        if self.cr0 & cr::CR0_PG == 0 {
            return Ok(Walk {
                page: lin & PAGE_MASK & 0xffff_ffff,
                writable: true,
                global: true,
                large: None,
            });
        }
        let r = if self.long_mode() {
            self.walk_levels::<4>(lin, access, privilege)
        } else if self.cr4 & cr::CR4_PAE != 0 {
            self.walk_levels::<3>(lin, access, privilege)
        } else {
            self.walk_legacy(lin, access, privilege)
        };
        r.map_err(|stop| {
            let mut code = stop.0;
            if access == Access::Write {
                code |= pf::W;
            }
            if privilege == Privilege::User {
                code |= pf::U;
            }
            let nx = self.efer & cr::EFER_NXE != 0 && self.cr4 & cr::CR4_PAE != 0;
            if access == Access::Exec && (nx || self.cr4 & cr::CR4_SMEP != 0) {
                code |= pf::I;
            }
            code
        })
    }

    fn permitted(&self, r: Rights, access: Access, privilege: Privilege) -> bool {
        if privilege == Privilege::User {
            return r.user
                && match access {
                    Access::Read => true,
                    Access::Write => r.write,
                    Access::Exec => r.exec,
                };
        }
        let smap = self.cr4 & cr::CR4_SMAP != 0 && privilege == Privilege::Supervisor;
        match access {
            Access::Read => !(r.user && smap),
            Access::Write => !(r.user && smap) && (r.write || self.cr0 & cr::CR0_WP == 0),
            Access::Exec => r.exec && !(r.user && self.cr4 & cr::CR4_SMEP != 0),
        }
    }

    /// Four-level and PAE paging.
    fn walk_levels<const LEVELS: u32>(
        &self,
        lin: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Walk, Stop> {
        let map = &self.mmu.phys;
        let beyond = !((1u64 << self.mmu.phys_bits) - 1) & 0x000f_ffff_ffff_f000;
        let nxe = self.efer & cr::EFER_NXE != 0;
        // In PAE paging, bits 52 to 62 are reserved; in four-level paging they are ignored.
        let always_reserved =
            beyond | if nxe { 0 } else { NX } | if LEVELS == 3 { 0x7ff0_0000_0000_0000 } else { 0 };
        'restart: loop {
            let mut rights = Rights { write: true, user: true, exec: true };
            let (mut table, mut level) = if LEVELS == 4 {
                (self.cr3 & 0x000f_ffff_ffff_f000, 4)
            } else {
                let entry = self.mmu.pdpte[(lin >> 30) as usize & 3];
                if entry & P == 0 {
                    return Err(Stop(0));
                }
                (entry & 0x000f_ffff_ffff_f000, 2)
            };
            loop {
                let shift = 12 + 9 * (level - 1);
                let at = table + (lin >> shift & 0x1ff) * 8;
                let entry = map.load::<true>(at);
                if entry & P == 0 {
                    return Err(Stop(0));
                }
                let leaf = level == 1 || entry & PS != 0 && level <= 3;
                let mut reserved = always_reserved;
                if level == 4 {
                    reserved |= PS;
                }
                if leaf && level > 1 {
                    // Bit 12 is PAT; from 13 up to the page's size, reserved.
                    reserved |= ((1u64 << shift) - 1) & !0x1fff;
                }
                if entry & reserved != 0 {
                    return Err(Stop(pf::P | pf::RSVD));
                }
                rights.write &= entry & RW != 0;
                rights.user &= entry & US != 0;
                rights.exec &= entry & NX == 0 || !nxe;
                if !leaf {
                    if entry & A == 0 && !map.set_bits::<true>(at, entry, A) {
                        continue 'restart;
                    }
                    table = entry & 0x000f_ffff_ffff_f000;
                    level -= 1;
                    continue;
                }
                if !self.permitted(rights, access, privilege) {
                    return Err(Stop(pf::P));
                }
                let bits = A | if access == Access::Write { D } else { 0 };
                if entry & bits != bits && !map.set_bits::<true>(at, entry, bits & !entry) {
                    continue 'restart;
                }
                let inside = (1u64 << shift) - 1;
                let base = entry & 0x000f_ffff_ffff_f000 & !inside;
                return Ok(Walk {
                    page: (base | lin & inside) & PAGE_MASK,
                    writable: (entry | bits) & D != 0 && self.permitted(rights, Access::Write, privilege),
                    global: entry & G != 0 && self.cr4 & cr::CR4_PGE != 0,
                    large: (level > 1).then_some(shift),
                });
            }
        }
    }

    /// 32-bit paging without PAE.
    fn walk_legacy(&self, lin: u64, access: Access, privilege: Privilege) -> Result<Walk, Stop> {
        let map = &self.mmu.phys;
        'restart: loop {
            let mut rights = Rights { write: true, user: true, exec: true };
            let (mut table, mut level) = (self.cr3 & 0xffff_f000, 2);
            loop {
                let shift = 12 + 10 * (level - 1);
                let at = table + (lin >> shift & 0x3ff) * 4;
                let entry = map.load::<false>(at);
                if entry & P == 0 {
                    return Err(Stop(0));
                }
                let large = level == 2 && entry & PS != 0 && self.cr4 & cr::CR4_PSE != 0;
                // PSE-36: bits 13 to 20 are address bits 32 to 39, bit 21 is reserved.
                if large && entry & (1 << 21) != 0 {
                    return Err(Stop(pf::P | pf::RSVD));
                }
                rights.write &= entry & RW != 0;
                rights.user &= entry & US != 0;
                if level == 2 && !large {
                    if entry & A == 0 && !map.set_bits::<false>(at, entry, A) {
                        continue 'restart;
                    }
                    table = entry & 0xffff_f000;
                    level = 1;
                    continue;
                }
                if !self.permitted(rights, access, privilege) {
                    return Err(Stop(pf::P));
                }
                let bits = A | if access == Access::Write { D } else { 0 };
                if entry & bits != bits && !map.set_bits::<false>(at, entry, bits & !entry) {
                    continue 'restart;
                }
                let base = if large {
                    entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
                } else {
                    entry & 0xffff_f000
                };
                let inside = (1u64 << shift) - 1;
                return Ok(Walk {
                    page: (base | lin & if large { inside } else { 0 }) & PAGE_MASK,
                    writable: (entry | bits) & D != 0 && self.permitted(rights, Access::Write, privilege),
                    global: entry & G != 0 && self.cr4 & cr::CR4_PGE != 0,
                    large: large.then_some(shift),
                });
            }
        }
    }
}
