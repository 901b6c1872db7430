//! Arithmetic flags: between the form of [`crate::Cpu::cc`] and RFLAGS.

/// RFLAGS bits of a `cc`.
#[inline(always)]
pub fn to_rflags(cc: u16) -> u64 {
    ((cc >> 8) & 0xd5) as u64 | ((cc & 1) as u64) << 11
}

/// `cc` of RFLAGS.
#[inline(always)]
pub fn from_rflags(rflags: u64) -> u16 {
    (((rflags & 0xd5) | 2) << 8) as u16 | (rflags >> 11 & 1) as u16
}

/// Flags within a `cc`.
#[allow(missing_docs)]
pub mod cc {
    pub const CF: u16 = 0x100;
    pub const PF: u16 = 0x400;
    pub const AF: u16 = 0x1000;
    pub const ZF: u16 = 0x4000;
    pub const SF: u16 = 0x8000;
    pub const OF: u16 = 1;
}

/// A condition of Jcc, SETcc, CMOVcc.
pub trait Condition: 'static {
    /// Whether it holds.
    fn holds(cc: u16) -> bool;
}

macro_rules! conditions {
    ($($name:ident = $cc:ident => $e:expr;)*) => {$(
        #[doc = concat!("Condition ", stringify!($name), ".")]
        pub struct $name;
        impl Condition for $name {
            #[inline(always)]
            fn holds($cc: u16) -> bool {
                $e
            }
        }
    )*};
}

conditions! {
    O = c => c & cc::OF != 0;
    No = c => c & cc::OF == 0;
    B = c => c & cc::CF != 0;
    Ae = c => c & cc::CF == 0;
    E = c => c & cc::ZF != 0;
    Ne = c => c & cc::ZF == 0;
    Be = c => c & (cc::CF | cc::ZF) != 0;
    A = c => c & (cc::CF | cc::ZF) == 0;
    S = c => c & cc::SF != 0;
    Ns = c => c & cc::SF == 0;
    P = c => c & cc::PF != 0;
    Np = c => c & cc::PF == 0;
    L = c => (c >> 15 ^ c) & 1 != 0;
    Ge = c => (c >> 15 ^ c) & 1 == 0;
    Le = c => ((c >> 15 ^ c) & 1 | c & cc::ZF) != 0;
    G = c => ((c >> 15 ^ c) & 1 | c & cc::ZF) == 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_convert_both_ways() {
        for bits in 0..64u64 {
            let r = bits & 1
                | (bits & 2) << 1
                | (bits & 4) << 2
                | (bits & 8) << 3
                | (bits & 16) << 3
                | (bits & 32) << 6;
            assert_eq!(to_rflags(from_rflags(r)), r);
            let c = from_rflags(r);
            let (cf, zf, sf, of) = (r & 1 != 0, r & 0x40 != 0, r & 0x80 != 0, r & 0x800 != 0);
            assert_eq!(Le::holds(c), zf || sf != of);
            assert_eq!(L::holds(c), sf != of);
            assert_eq!(Be::holds(c), cf || zf);
            assert_ne!(G::holds(c), Le::holds(c));
        }
    }
}
