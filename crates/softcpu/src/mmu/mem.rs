//! Loads and stores of guest memory.
//!
//! Guest memory is shared with other vCPUs and with devices, so it is never touched through references: each access
//! is one machine instruction that the compiler cannot see through. The host orders memory as the guest expects.
#![allow(unsafe_code)]

use std::arch::asm;

/// What one instruction can load or store.
pub trait Mem: Copy + Sized {
    /// Loads.
    ///
    /// # Safety
    /// `p` is the address of a whole value inside mapped memory.
    unsafe fn load(p: *const u8) -> Self;
    /// Stores.
    ///
    /// # Safety
    /// As for [`Self::load`], and nothing in Rust's hands lives there.
    unsafe fn store(self, p: *mut u8);
    /// From the first bytes of a buffer.
    fn from_buf(b: &[u8; 16]) -> Self;
    /// Into the first bytes of a buffer.
    fn to_buf(self) -> [u8; 16];
}

macro_rules! mem {
    ($($t:ty, $class:ident, $reg:literal);*) => {$(
        impl Mem for $t {
            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self {
                let v: $t;
                // SAFETY: the caller's.
                unsafe {
                    asm!(concat!("mov {0", $reg, "}, [{1}]"), out($class) v, in(reg) p,
                        options(nostack, preserves_flags, readonly));
                }
                v
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut u8) {
                // SAFETY: the caller's.
                unsafe {
                    asm!(concat!("mov [{1}], {0", $reg, "}"), in($class) self, in(reg) p,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            fn from_buf(b: &[u8; 16]) -> Self {
                u128::from_le_bytes(*b) as $t
            }
            #[inline(always)]
            fn to_buf(self) -> [u8; 16] {
                (self as u128).to_le_bytes()
            }
        }
    )*};
}
mem!(u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, "");

/// Copies out of guest memory, in pieces as large as possible.
///
/// # Safety
/// `from` is valid for `to.len()` bytes.
pub unsafe fn copy_out(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's. MOVSB reads each byte once, whatever others write meanwhile.
    unsafe {
        asm!("rep movsb", inout("rcx") to.len() => _, inout("rsi") from => _, inout("rdi") to.as_mut_ptr() => _,
            options(nostack, preserves_flags));
    }
}

/// Copies into guest memory.
///
/// # Safety
/// `to` is valid for `from.len()` bytes.
pub unsafe fn copy_in(from: &[u8], to: *mut u8) {
    // SAFETY: as above.
    unsafe {
        asm!("rep movsb", inout("rcx") from.len() => _, inout("rsi") from.as_ptr() => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}
