//! The host's own floating-point units: the few instructions that Rust has no other way to say.
//!
//! Rust assumes an empty x87 stack and a default MXCSR. While a vCPU runs, both may hold the guest's; that is sound
//! because the code that runs meanwhile (this crate) computes nothing in floating point, and [`super::Fpu::park`] and
//! [`super::Fpu::flush`] restore them before any other code runs. Exceptions are always masked in MXCSR, and never
//! pending in the x87 unit, so no host instruction can trap.
#![allow(unsafe_code)]

use super::Legacy;
use std::arch::asm;

#[inline(always)]
pub(super) fn stmxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes at a valid address.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// The value has reserved bits clear.
#[inline(always)]
pub(super) fn ldmxcsr(value: u32) {
    // SAFETY: the value is valid; see the module for what it means to Rust code.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, readonly)) };
}

pub(super) fn fxsave(image: &mut Legacy) {
    // SAFETY: 512 bytes, aligned.
    unsafe { asm!("fxsave64 [{}]", in(reg) std::ptr::from_mut(image), options(nostack, preserves_flags)) };
}

/// The image's MXCSR must be the current one.
pub(super) fn fxrstor(image: &Legacy) {
    // SAFETY: 512 aligned bytes that the type keeps valid (MXCSR was stored by the host itself). The XMM registers are
    // declared lost, and the x87 stack is the subject of the module's contract.
    unsafe {
        asm!("fxrstor64 [{}]", in(reg) std::ptr::from_ref(image), options(nostack, readonly),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _);
    }
}

#[inline(always)]
pub(super) fn fninit() {
    // SAFETY: gives the x87 unit the state that Rust expects.
    unsafe { asm!("fninit", options(nostack, nomem)) };
}

#[inline(always)]
pub(super) fn emms() {
    // SAFETY: empties the x87 stack, which holds the guest's.
    unsafe { asm!("emms", options(nostack, nomem)) };
}

#[inline(always)]
pub(super) fn fnstsw() -> u16 {
    let value: u16;
    // SAFETY: reads the status word.
    unsafe { asm!("fnstsw ax", out("ax") value, options(nostack, nomem, preserves_flags)) };
    value
}

#[inline(always)]
pub(super) fn fnstcw() -> u16 {
    let mut value = 0u16;
    // SAFETY: stores two bytes at a valid address.
    unsafe { asm!("fnstcw [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// No raised flag may become unmasked by it.
#[inline(always)]
pub(super) fn fldcw(value: u16) {
    // SAFETY: loads the control word; the guest's x87 stack is loaded, so it is the guest's to change.
    unsafe { asm!("fldcw [{}]", in(reg) &raw const value, options(nostack, readonly)) };
}
