//! Segments of 16-bit code: a local descriptor table with one of each kind, the same for the processor and the guest.

use crate::case::*;
use accel::state::Segment;
use iced_x86::Register;

/// A descriptor as modify_ldt(2) can make it.
pub struct Descriptor {
    pub base: u64,
    /// In bytes, or in pages of 4 KiB if `pages`.
    pub limit: u32,
    pub pages: bool,
    /// Data 0, expand-down data 1, code 2.
    pub contents: u32,
    /// Data that cannot be written, code that cannot be read.
    pub restricted: bool,
    /// 32-bit default sizes.
    pub big: bool,
    pub present: bool,
}

/// Base of [`LDT`]'s expand-down segment, whose lowest valid offset is 0x1000.
const DOWN: u64 = DATA - 0x1000;

const fn data(base: u64, limit: u32) -> Descriptor {
    Descriptor { base, limit, pages: false, contents: 0, restricted: false, big: false, present: true }
}

/// The table.
pub const LDT: [Descriptor; 9] = [
    Descriptor { contents: 2, ..data(CODE, 0xfff) },
    data(DATA, 0x2fff),
    Descriptor { contents: 1, ..data(DOWN, 0xfff) },
    Descriptor { restricted: true, ..data(DATA, 0x2fff) },
    Descriptor { pages: true, big: true, ..data(0, 0xf_ffff) },
    Descriptor { present: false, ..data(DATA, 0x2fff) },
    Descriptor { contents: 2, restricted: true, ..data(CODE, 0xfff) },
    data(DATA + 0x100, 0x1ff),
    Descriptor { contents: 1, big: true, ..data(DOWN, 0xfff) },
];

/// Selector of entry `n`.
pub const fn selector(n: usize) -> u16 {
    n as u16 * 8 + 7
}

/// CS, and what DS, SS and ES hold at first, in 16-bit code.
pub const CODE16: u16 = selector(0);
pub const DATA16: u16 = selector(1);
pub const DOWN16: u16 = selector(2);

/// Selectors that are worth loading: everything in the table, with several requested privileges, what is behind its
/// end, null ones, and the global ones that both sides have.
pub fn selectors() -> Vec<u16> {
    let mut all: Vec<u16> = (0..LDT.len() + 2).map(selector).collect();
    all.extend((0..LDT.len()).map(|n| selector(n) & !3 | (n as u16 & 3)));
    all.extend([0, 1, 2, 3, USER_SS, USER_CS, USER32_CS]);
    all
}

/// Segments at the start of a case: ES, SS, DS.
pub fn initial(bits: u32) -> [u16; 3] {
    if bits == 16 { [DOWN16, DATA16, DATA16] } else { [USER_SS; 3] }
}

/// Base of a segment register at the start of a case.
pub fn base(bits: u32, register: Register) -> u64 {
    match register {
        Register::GS if bits == 64 => GS_BASE,
        Register::CS if bits == 16 => CODE,
        Register::ES if bits == 16 => DOWN,
        Register::DS | Register::SS if bits == 16 => DATA,
        _ => 0,
    }
}

impl Descriptor {
    /// Type, S, DPL 3, P, AVL, D/B, G as in [`Segment::attributes`].
    pub fn attributes(&self) -> u32 {
        let kind = 1 | u32::from(!self.restricted) << 1 | self.contents << 2;
        let flags = u32::from(self.big) << 14 | u32::from(self.pages) << 15 | 1 << 12;
        kind | 1 << 4 | 3 << 5 | u32::from(self.present) << 7 | flags
    }

    /// The descriptor itself.
    pub fn bits(&self) -> u64 {
        let (base, limit) = (self.base, u64::from(self.limit));
        let a = u64::from(self.attributes());
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | (a & 0xff) << 40
            | (limit >> 16) << 48
            | (a >> 12 & 0xf) << 52
            | (base >> 24) << 56
    }

    /// As the register that holds it.
    pub fn segment(&self, selector: u16) -> Segment {
        let limit = if self.pages { self.limit << 12 | 0xfff } else { self.limit };
        Segment { selector, base: self.base, limit, attributes: self.attributes() }
    }

    /// `struct user_desc` of modify_ldt(2).
    pub fn user_desc(&self, n: u32) -> [u32; 4] {
        let flags = u32::from(self.big)
            | self.contents << 1
            | u32::from(self.restricted) << 3
            | u32::from(self.pages) << 4
            | u32::from(!self.present) << 5
            | 1 << 6;
        [n, self.base as u32, self.limit, flags]
    }
}
