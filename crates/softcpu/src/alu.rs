//! Integer arithmetic by the host's own instructions, with its flags.
//!
//! The results and all flags, also those that the manuals leave undefined, are what the host computes, so the
//! interpreter, translated code and the processor agree. Flags travel as [`crate::Cpu::cc`]: LAHF and SETO produce
//! that form in AX, and `add al, 0x7f; sahf` loads it.
#![allow(unsafe_code)]

use crate::native::features::{Host, Leaf};
use crate::state::Int;
use std::arch::asm;

macro_rules! methods {
    (
        binary: $($bin:ident)*;
        carry: $($car:ident)*;
        unary: $($un:ident)*;
        shift: $($sh:ident)*;
        double: $($dbl:ident)*;
        bit: $($bit:ident)*;
        scan: $($scan:ident)*;
    ) => {
        /// Arithmetic on one operand size. All functions return `cc` beside the result.
        #[allow(missing_docs)]
        pub trait Alu: Int {
            $(fn $bin(a: Self, b: Self) -> (Self, u16);)*
            $(fn $car(a: Self, b: Self, cc: u16) -> (Self, u16);)*
            $(fn $un(a: Self, cc: u16) -> (Self, u16);)*
            $(fn $sh(a: Self, count: u8, cc: u16) -> (Self, u16);)*
            fn cmp(a: Self, b: Self) -> u16;
            fn test(a: Self, b: Self) -> u16;
        }

        /// Arithmetic that exists for 16, 32 and 64 bits only.
        #[allow(missing_docs)]
        pub trait WideAlu: Alu {
            $(fn $dbl(a: Self, b: Self, count: u8, cc: u16) -> (Self, u16);)*
            /// BT and its relatives; `bit` is taken modulo the operand size.
            $(fn $bit(a: Self, bit: Self, cc: u16) -> (Self, u16);)*
            $(fn $scan(old: Self, a: Self, cc: u16) -> (Self, u16);)*
        }

        all! {u8, reg_byte, "", "byte"; $($bin)*; $($car)*; $($un)*; $($sh)*}
        all! {u16, reg, ":x", "word"; $($bin)*; $($car)*; $($un)*; $($sh)*}
        all! {u32, reg, ":e", "dword"; $($bin)*; $($car)*; $($un)*; $($sh)*}
        all! {u64, reg, "", "qword"; $($bin)*; $($car)*; $($un)*; $($sh)*}
        wide! {u16, ":x"; $($dbl)*; $($bit)*; $($scan)*}
        wide! {u32, ":e"; $($dbl)*; $($bit)*; $($scan)*}
        wide! {u64, ""; $($dbl)*; $($bit)*; $($scan)*}
    };
}

macro_rules! all {
    ($t:ty, $class:ident, $r:literal, $ptr:literal; $($bin:ident)*; $($car:ident)*; $($un:ident)*; $($sh:ident)*) => {
        impl Alu for $t {
            $(#[inline(always)]
            fn $bin(mut a: Self, b: Self) -> (Self, u16) {
                let cc: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(concat!(name!($bin), " {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        inout($class) a, in($class) b, out("ax") cc, options(pure, nomem, nostack));
                }
                (a, cc)
            })*
            $(#[inline(always)]
            fn $car(mut a: Self, b: Self, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("sahf", concat!(name!($car), " {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        inout($class) a, in($class) b, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (a, out)
            })*
            $(#[inline(always)]
            fn $un(mut a: Self, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("sahf", concat!(name!($un), " {0", $r, "}"), "lahf", "seto al",
                        inout($class) a, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (a, out)
            })*
            $(#[inline(always)]
            fn $sh(mut a: Self, count: u8, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only. A count of zero leaves the flags as they were loaded.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!(name!($sh), " {0", $r, "}, cl"), "lahf", "seto al",
                        inout($class) a, in("cl") count, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (a, out)
            })*
            #[inline(always)]
            fn cmp(a: Self, b: Self) -> u16 {
                let cc: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(concat!("cmp {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        in($class) a, in($class) b, out("ax") cc, options(pure, nomem, nostack));
                }
                cc
            }
            #[inline(always)]
            fn test(a: Self, b: Self) -> u16 {
                let cc: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!(concat!("test {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        in($class) a, in($class) b, out("ax") cc, options(pure, nomem, nostack));
                }
                cc
            }
        }
    };
}

macro_rules! wide {
    ($t:ty, $r:literal; $($dbl:ident)*; $($bit:ident)*; $($scan:ident)*) => {
        impl WideAlu for $t {
            $(#[inline(always)]
            fn $dbl(mut a: Self, b: Self, count: u8, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!(name!($dbl), " {0", $r, "}, {1", $r, "}, cl"), "lahf", "seto al",
                        inout(reg) a, in(reg) b, in("cl") count, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (a, out)
            })*
            $(#[inline(always)]
            fn $bit(mut a: Self, bit: Self, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!(name!($bit), " {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        inout(reg) a, in(reg) bit, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (a, out)
            })*
            $(#[inline(always)]
            fn $scan(mut old: Self, a: Self, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!(name!($scan), " {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        inout(reg) old, in(reg) a, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (old, out)
            })*
        }
    };
}

/// Method names to mnemonics (raw identifiers where Rust has keywords of that name).
macro_rules! name {
    (and_) => {
        "and"
    };
    (or_) => {
        "or"
    };
    (not_) => {
        "not"
    };
    ($n:ident) => {
        stringify!($n)
    };
}

methods! {
    binary: add sub and_ or_ xor;
    carry: adc sbb;
    unary: inc dec neg;
    shift: shl shr sar rol ror rcl rcr;
    double: shld shrd;
    bit: bt bts btr btc;
    scan: bsf bsr lzcnt tzcnt popcnt;
}

/// A two-operand arithmetic instruction.
pub trait Binary: 'static {
    /// Whether it writes its first operand.
    const WRITES: bool = true;
    /// On registers.
    fn run<T: Alu>(a: T, b: T, cc: u16) -> (T, u16);
    /// Atomically on memory, returning `cc`.
    ///
    /// # Safety
    /// `p` is valid for an access of the operand size.
    unsafe fn locked<T: Locked>(p: *mut u8, b: T, cc: u16) -> u16;
}

/// Locked arithmetic on memory.
#[allow(missing_docs, clippy::missing_safety_doc)] // the contract is the same for all: a valid address
pub trait Locked: Alu {
    unsafe fn lock_add(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_sub(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_and(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_or(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_xor(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_adc(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_sbb(p: *mut u8, b: Self, cc: u16) -> u16;
    unsafe fn lock_inc(p: *mut u8, cc: u16) -> u16;
    unsafe fn lock_dec(p: *mut u8, cc: u16) -> u16;
    unsafe fn lock_neg(p: *mut u8, cc: u16) -> u16;
    unsafe fn lock_not(p: *mut u8);
    unsafe fn xchg(p: *mut u8, b: Self) -> Self;
    unsafe fn lock_xadd(p: *mut u8, b: Self) -> (Self, u16);
    /// Returns the old value and `cc`; equal to `expected` if the exchange took place.
    unsafe fn lock_cmpxchg(p: *mut u8, expected: Self, new: Self) -> (Self, u16);
}

/// Locked bit operations on memory; the bit number is below the operand size.
#[allow(missing_docs, clippy::missing_safety_doc)]
pub trait LockedBits: WideAlu + Locked {
    unsafe fn lock_bts(p: *mut u8, bit: Self, cc: u16) -> u16;
    unsafe fn lock_btr(p: *mut u8, bit: Self, cc: u16) -> u16;
    unsafe fn lock_btc(p: *mut u8, bit: Self, cc: u16) -> u16;
}

macro_rules! locked {
    ($($t:ty, $class:ident, $r:literal, $ptr:literal, $acc:literal);*) => {$(
        impl Locked for $t {
            locked_op!($t, $class, $r, lock_add "add", lock_sub "sub", lock_and "and", lock_or "or", lock_xor "xor",
                lock_adc "adc", lock_sbb "sbb");
            locked_unary!($ptr, lock_inc "inc", lock_dec "dec", lock_neg "neg");
            #[inline(always)]
            unsafe fn lock_not(p: *mut u8) {
                // SAFETY: the caller's.
                unsafe { asm!(concat!("lock not ", $ptr, " ptr [{0}]"), in(reg) p, options(nostack, preserves_flags)) };
            }
            #[inline(always)]
            unsafe fn xchg(p: *mut u8, mut b: Self) -> Self {
                // SAFETY: the caller's.
                unsafe {
                    asm!(concat!("xchg [{0}], {1", $r, "}"), in(reg) p, inout($class) b, options(nostack, preserves_flags));
                }
                b
            }
            #[inline(always)]
            unsafe fn lock_xadd(p: *mut u8, mut b: Self) -> (Self, u16) {
                let cc: u16;
                // SAFETY: the caller's.
                unsafe {
                    asm!(concat!("lock xadd [{0}], {1", $r, "}"), "lahf", "seto al",
                        in(reg) p, inout($class) b, out("ax") cc, options(nostack));
                }
                (b, cc)
            }
            #[inline(always)]
            unsafe fn lock_cmpxchg(p: *mut u8, expected: Self, new: Self) -> (Self, u16) {
                let (old, cc): (u64, u64);
                // SAFETY: the caller's.
                unsafe {
                    asm!(concat!("lock cmpxchg [{0}], {1", $r, "}"), "mov {2}, rax", "lahf", "seto al",
                        in(reg) p, in($class) new, out(reg) old, inout("rax") expected as u64 => cc, options(nostack));
                }
                (old as $t, cc as u16)
            }
        }
    )*};
}

macro_rules! locked_op {
    ($t:ty, $class:ident, $r:literal, $($name:ident $ins:literal),*) => {$(
        #[inline(always)]
        unsafe fn $name(p: *mut u8, b: Self, cc: u16) -> u16 {
            let out: u16;
            // SAFETY: the caller's.
            unsafe {
                asm!("sahf", concat!("lock ", $ins, " [{0}], {1", $r, "}"), "lahf", "seto al",
                    in(reg) p, in($class) b, inout("ax") cc => out, options(nostack));
            }
            out
        }
    )*};
}

macro_rules! locked_unary {
    ($ptr:literal, $($name:ident $ins:literal),*) => {$(
        #[inline(always)]
        unsafe fn $name(p: *mut u8, cc: u16) -> u16 {
            let out: u16;
            // SAFETY: the caller's.
            unsafe {
                asm!("sahf", concat!("lock ", $ins, " ", $ptr, " ptr [{0}]"), "lahf", "seto al",
                    in(reg) p, inout("ax") cc => out, options(nostack));
            }
            out
        }
    )*};
}

locked!(u8, reg_byte, "", "byte", "al"; u16, reg, ":x", "word", "ax"; u32, reg, ":e", "dword", "eax";
    u64, reg, "", "qword", "rax");

macro_rules! locked_bits {
    ($($t:ty, $r:literal);*) => {$(
        impl LockedBits for $t {
            locked_bit!($t, $r, lock_bts "bts", lock_btr "btr", lock_btc "btc");
        }
    )*};
}

macro_rules! locked_bit {
    ($t:ty, $r:literal, $($name:ident $ins:literal),*) => {$(
        #[inline(always)]
        unsafe fn $name(p: *mut u8, bit: Self, cc: u16) -> u16 {
            let out: u16;
            // SAFETY: the caller's; the bit number keeps the access within the operand.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!("lock ", $ins, " [{0}], {1", $r, "}"), "lahf", "seto al",
                    in(reg) p, in(reg) bit & (<$t>::BITS - 1) as $t, inout("ax") cc => out, options(nostack));
            }
            out
        }
    )*};
}

locked_bits!(u16, ":x"; u32, ":e"; u64, "");

macro_rules! binary {
    ($($name:ident, $writes:literal, |$a:ident, $b:ident, $cc:ident| $run:expr, $locked:ident;)*) => {$(
        #[doc = concat!(stringify!($name), ".")]
        #[derive(Debug)]
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn run<T: Alu>($a: T, $b: T, $cc: u16) -> (T, u16) {
                $run
            }
            #[inline(always)]
            unsafe fn locked<T: Locked>(p: *mut u8, b: T, cc: u16) -> u16 {
                // SAFETY: the caller's.
                unsafe { T::$locked(p, b, cc) }
            }
        }
    )*};
}

binary! {
    Add, true, |a, b, _cc| T::add(a, b), lock_add;
    Or, true, |a, b, _cc| T::or_(a, b), lock_or;
    Adc, true, |a, b, cc| T::adc(a, b, cc), lock_adc;
    Sbb, true, |a, b, cc| T::sbb(a, b, cc), lock_sbb;
    And, true, |a, b, _cc| T::and_(a, b), lock_and;
    Sub, true, |a, b, _cc| T::sub(a, b), lock_sub;
    Xor, true, |a, b, _cc| T::xor(a, b), lock_xor;
    Cmp, false, |a, b, _cc| (a, T::cmp(a, b)), lock_sub;
    Test, false, |a, b, _cc| (a, T::test(a, b)), lock_and;
}

/// A shift or rotation.
pub trait Shift: 'static {
    /// By `count` (masked by the processor).
    fn run<T: Alu>(a: T, count: u8, cc: u16) -> (T, u16);
}

macro_rules! shifts {
    ($($name:ident $f:ident),*) => {$(
        #[doc = concat!(stringify!($name), ".")]
        #[derive(Debug)]
        pub struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Alu>(a: T, count: u8, cc: u16) -> (T, u16) {
                T::$f(a, count, cc)
            }
        }
    )*};
}
shifts!(Shl shl, Shr shr, Sar sar, Rol rol, Ror ror, Rcl rcl, Rcr rcr);

/// Widening multiplication and division. The first operand's halves are (low, high).
#[allow(missing_docs)]
pub trait MulDiv: WideAlu {
    fn mul(a: Self, b: Self, cc: u16) -> (Self, Self, u16);
    fn imul(a: Self, b: Self, cc: u16) -> (Self, Self, u16);
    /// Two-operand IMUL.
    fn imul2(a: Self, b: Self, cc: u16) -> (Self, u16);
    /// `None` on division by zero or overflow.
    fn div(lo: Self, hi: Self, b: Self, cc: u16) -> Option<(Self, Self, u16)>;
    /// `None` on division by zero or overflow.
    fn idiv(lo: Self, hi: Self, b: Self, cc: u16) -> Option<(Self, Self, u16)>;
}

macro_rules! muldiv {
    ($($t:ty, $s:ty, $ww:ty, $ws:ty, $r:literal, $acc:literal);*) => {$(
        impl MulDiv for $t {
            muldiv_mul!($t, $r, $acc, mul "mul", imul "imul");
            #[inline(always)]
            fn imul2(mut a: Self, b: Self, cc: u16) -> (Self, u16) {
                let out: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!("imul {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        inout(reg) a, in(reg) b, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (a, out)
            }
            fn div(lo: Self, hi: Self, b: Self, cc: u16) -> Option<(Self, Self, u16)> {
                // Also refuses b == 0.
                if hi >= b {
                    return None;
                }
                // SAFETY: the quotient fits, so the instruction does not fault.
                Some(unsafe { muldiv_div!($t, $r, $acc, "div", lo, hi, b, cc) })
            }
            fn idiv(lo: Self, hi: Self, b: Self, cc: u16) -> Option<(Self, Self, u16)> {
                let n = ((hi as $ww) << <$t>::BITS | lo as $ww) as $ws;
                let d = b as $s as $ws;
                let q = n.checked_div(d)?;
                if q != q as $s as $ws {
                    return None;
                }
                // SAFETY: the quotient fits, so the instruction does not fault.
                Some(unsafe { muldiv_div!($t, $r, $acc, "idiv", lo, hi, b, cc) })
            }
        }
    )*};
}

macro_rules! muldiv_mul {
    ($t:ty, $r:literal, $acc:literal, $($name:ident $ins:literal),*) => {$(
        #[inline(always)]
        fn $name(mut a: Self, b: Self, cc: u16) -> (Self, Self, u16) {
            let (hi, out): (u64, u64);
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!("mov ", $acc, ", {0", $r, "}"), concat!($ins, " {1", $r, "}"),
                    concat!("mov {0", $r, "}, ", $acc), "lahf", "seto al",
                    inout(reg) a, in(reg) b, inout("rax") cc as u64 => out, out("rdx") hi,
                    options(pure, nomem, nostack));
            }
            (a, hi as $t, out as u16)
        }
    )*};
}

macro_rules! muldiv_div {
    ($t:ty, $r:literal, $acc:literal, $ins:literal, $lo:ident, $hi:ident, $b:ident, $cc:ident) => {{
        let mut a = $lo;
        let (rem, out): (u64, u64);
        asm!("add al, 0x7f", "sahf", concat!("mov ", $acc, ", {0", $r, "}"), concat!($ins, " {1", $r, "}"),
            concat!("mov {0", $r, "}, ", $acc), "lahf", "seto al",
            inout(reg) a, in(reg) $b, inout("rax") $cc as u64 => out, inout("rdx") $hi as u64 => rem,
            options(pure, nomem, nostack));
        (a, rem as $t, out as u16)
    }};
}

muldiv!(u16, i16, u32, i32, ":x", "ax"; u32, i32, u64, i64, ":e", "eax"; u64, i64, u128, i128, "", "rax");

macro_rules! byte_mul {
    ($($name:ident $ins:literal),*) => {$(
        /// AX = AL * operand.
        pub fn $name(al: u8, b: u8, cc: u16) -> (u16, u16) {
            let mut a = al as u64;
            let out: u64;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 0x7f", "sahf", "mov rax, {0}", concat!($ins, " {1}"), "mov {0}, rax", "lahf", "seto al",
                    inout(reg) a, in(reg_byte) b, inout("rax") cc as u64 => out, options(pure, nomem, nostack));
            }
            (a as u16, out as u16)
        }
    )*};
}
byte_mul!(mul8 "mul", imul8 "imul");

macro_rules! byte_div {
    ($($name:ident $ins:literal, |$ax:ident, $b:ident| $fits:expr);*) => {$(
        /// AL = AX / operand, AH = the remainder. `None` on division by zero or overflow.
        pub fn $name($ax: u16, $b: u8, cc: u16) -> Option<(u16, u16)> {
            if !$fits {
                return None;
            }
            let mut a = $ax as u64;
            let out: u64;
            // SAFETY: the quotient fits, so the instruction does not fault.
            unsafe {
                asm!("add al, 0x7f", "sahf", "mov rax, {0}", concat!($ins, " {1}"), "mov {0}, rax", "lahf", "seto al",
                    inout(reg) a, in(reg_byte) $b, inout("rax") cc as u64 => out, options(pure, nomem, nostack));
            }
            Some((a as u16, out as u16))
        }
    )*};
}
byte_div!(div8 "div", |ax, b| (ax >> 8) < b as u16;
    idiv8 "idiv", |ax, b| (ax as i16 as i32).checked_div(b as i8 as i32).is_some_and(|q| q as i8 as i32 == q));

/// CMPXCHG16B under LOCK: returns the old value and whether the exchange took place.
///
/// # Safety
/// `p` is valid for 16 bytes and 16-byte aligned.
pub unsafe fn lock_cmpxchg16b(p: *mut u8, expected: (u64, u64), new: (u64, u64)) -> ((u64, u64), bool) {
    let (lo, hi): (u64, u64);
    let done: u8;
    // SAFETY: the caller's. RBX is reserved for the compiler, hence the exchanges.
    unsafe {
        asm!("xchg rbx, r9", "lock cmpxchg16b [rdi]", "sete r8b", "mov rbx, r9",
            in("rdi") p, inout("r9") new.0 => _, out("r8b") done,
            inout("rax") expected.0 => lo, inout("rdx") expected.1 => hi, in("rcx") new.1, options(nostack));
    }
    ((lo, hi), done != 0)
}

macro_rules! host_random {
    ($($name:ident $ins:literal $leaf:ident $bit:literal),*) => {$(
        /// A random number from the host, or `None` if it has none at the moment.
        pub fn $name() -> Option<u64> {
            if Host::get().word(Leaf::$leaf) >> $bit & 1 == 0 {
                return None;
            }
            let v: u64;
            let ok: u8;
            // SAFETY: the instruction exists, as just checked.
            unsafe { asm!(concat!($ins, " {0}"), "setc {1}", out(reg) v, out(reg_byte) ok, options(nomem, nostack)) };
            (ok != 0).then_some(v)
        }
    )*};
}
host_random!(rdrand "rdrand" OneEcx 30, rdseed "rdseed" SevenEbx 18);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{cc, to_rflags};
    use crate::state::fl;

    #[test]
    fn flags_come_from_the_host() {
        let (r, c) = u8::add(0xff, 1);
        assert_eq!(r, 0);
        assert_eq!(to_rflags(c), fl::CF | fl::ZF | fl::PF | fl::AF);
        let (r, c) = u32::sub(0x8000_0000, 1);
        assert_eq!(r, 0x7fff_ffff);
        assert_eq!(to_rflags(c) & (fl::OF | fl::SF | fl::CF | fl::ZF), fl::OF);
        assert_eq!(u64::adc(1, 2, cc::CF).0, 4);
        assert_eq!(u16::inc(0xffff, cc::CF), (0, cc::CF | cc::ZF | cc::PF | cc::AF | 0x200));
    }

    #[test]
    fn shift_by_zero_keeps_flags() {
        let all = cc::CF | cc::PF | cc::AF | cc::ZF | cc::SF | 0x200 | cc::OF;
        assert_eq!(u32::shl(5, 32, all), (5, all));
        assert_eq!(u32::shl(5, 0, 0x200), (5, 0x200));
    }

    #[test]
    fn divisions_refuse_what_would_trap() {
        assert!(u64::div(0, 1, 1, 0).is_none());
        assert!(u64::div(5, 0, 0, 0).is_none());
        assert_eq!(u64::div(7, 1, 2, 0).map(|r| (r.0, r.1)), Some((0x8000_0000_0000_0003, 1)));
        assert!(u32::idiv(0x8000_0000, 0xffff_ffff, u32::MAX, 0).is_none());
        assert!(u64::idiv(0, 1 << 63, u64::MAX, 0).is_none());
        assert_eq!(
            u32::idiv((-7i32) as u32, u32::MAX, 2, 0).map(|r| (r.0, r.1)),
            Some((-3i32 as u32, -1i32 as u32))
        );
        assert!(idiv8(0x8000, 0xff, 0).is_none());
        assert!(div8(0x100, 1, 0).is_none());
        assert_eq!(div8(0x101, 2, 0).map(|r| r.0), Some(0x180));
    }

    #[test]
    fn locked_operations() {
        let mut v = 5u64;
        let p = (&raw mut v).cast::<u8>();
        // SAFETY: the address of a local.
        unsafe {
            assert_eq!(u64::lock_cmpxchg(p, 5, 9), (5, cc::ZF | cc::PF | 0x200));
            assert_eq!(u64::lock_cmpxchg(p, 5, 7).0, 9);
            assert_eq!(u64::lock_xadd(p, 1).0, 9);
            assert_eq!(u64::xchg(p, 77), 10);
            u64::lock_not(p);
        }
        assert_eq!(v, !77);
        let mut pair = aligned([1, 2]);
        // SAFETY: aligned by its type.
        let r = unsafe { lock_cmpxchg16b((&raw mut pair).cast(), (1, 2), (3, 4)) };
        assert_eq!((r, pair.0), (((1, 2), true), [3, 4]));
    }

    #[repr(align(16))]
    struct Pair([u64; 2]);

    fn aligned(v: [u64; 2]) -> Pair {
        Pair(v)
    }
}
