//! Architectural state to and from KVM.

use super::vm::Inner;
use super::{host, msrs, refused, sys};
use crate::state::{Events, MpState, Segment, Table, seg};
use crate::{CpuState, Error, Result};
use kvm_bindings::{
    KVM_APIC_REG_SIZE, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable,
    kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;
/// EFER.SVME and CR4.VMXE: the guest is itself a hypervisor.
const SVME: u64 = 1 << 12;
const VMXE: u64 = 1 << 13;
/// Legacy region and header of an XSAVE area, in bytes.
const XSAVE_LEAST: usize = 576;
/// #BP and #OF, which INT3 and INTO raise.
const SOFT_EXCEPTIONS: [u8; 2] = [3, 4];

/// Reads the whole state.
pub(super) fn save(fd: &VcpuFd, vm: &Inner) -> Result<CpuState> {
    // First: it may carry out an INIT or SIPI, which changes registers.
    let mp_state = fd.get_mp_state().map_err(host("cannot get the vCPU's run state"))?;
    let mut state = CpuState { mp_state: mp_from_kvm(mp_state.mp_state)?, ..Default::default() };
    save_registers(fd, &mut state)?;
    if state.efer & SVME != 0 || state.cr4 & VMXE != 0 {
        return Err(Error::Unsupported(
            "the guest is running virtual machines of its own: such a vCPU cannot be saved; stop them first"
                .into(),
        ));
    }
    let events = fd.get_vcpu_events().map_err(host("cannot get the vCPU's pending events"))?;
    if events.smi.smm != 0 {
        return Err(Error::Unsupported(
            "the vCPU is in system management mode and cannot be saved there".into(),
        ));
    }
    state.events = events_from_kvm(&events);
    let debug = fd.get_debug_regs().map_err(host("cannot get the vCPU's debug registers"))?;
    state.dr = [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7];
    state.xcr0 = 1;
    if vm.has_xcrs() {
        let xcrs = fd.get_xcrs().map_err(host("cannot get the vCPU's XCR0"))?;
        let known = &xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())];
        state.xcr0 = known.iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
    }
    state.xsave = sys::get_xsave(fd, vm.xsave_size()).map_err(|source| Error::Host {
        what: "cannot get the vCPU's floating-point and vector registers".into(),
        source,
    })?;
    let lapic = fd.get_lapic().map_err(host("cannot get the vCPU's local APIC"))?;
    state.lapic = Some(lapic.regs.iter().map(|&b| b as u8).collect());
    state.msrs = msrs::read(fd, vm.msrs(fd)?)?;
    Ok(state)
}

/// Loads the whole state. The order matters: the APIC base before the APIC, the APIC and the TSC before the timer's
/// MSR, and pending events last, since other parts reset them.
pub(super) fn load(fd: &VcpuFd, vm: &Inner, state: &CpuState) -> Result<()> {
    check_xsave(&state.xsave, vm.xsave_size().max(sys::XSAVE_MIN))?;
    let mut sregs = fd.get_sregs().map_err(host("cannot get the vCPU's system registers"))?;
    sregs_to_kvm(state, &mut sregs);
    sregs.cr8 = state.cr8;
    sregs.apic_base = state.apic_base;
    fd.set_sregs(&sregs).map_err(refused("segment and control registers"))?;
    fd.set_regs(&regs_to_kvm(state)).map_err(refused("general registers"))?;
    if vm.has_xcrs() {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..Default::default() };
        fd.set_xcrs(&xcrs).map_err(refused("value of XCR0 (features that this host lacks?)"))?;
    }
    sys::set_xsave(fd, &state.xsave, vm.xsave_size()).map_err(|e| {
        Error::BadState(format!(
            "KVM refuses the floating-point and vector registers (features that this host lacks?): {e}"
        ))
    })?;
    let [db0, db1, db2, db3, dr6, dr7] = state.dr;
    let debug = kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(refused("debug registers"))?;
    if let Some(page) = &state.lapic {
        let mut lapic = kvm_lapic_state::default();
        let registers = page.get(..KVM_APIC_REG_SIZE as usize).ok_or_else(|| {
            Error::BadState(format!("a local APIC page of {} bytes is too short", page.len()))
        })?;
        lapic.regs.iter_mut().zip(registers).for_each(|(to, from)| *to = *from as std::ffi::c_char);
        fd.set_lapic(&lapic).map_err(refused("local APIC state"))?;
    }
    msrs::write(fd, &state.msrs)?;
    fd.set_mp_state(kvm_mp_state { mp_state: mp_to_kvm(state.mp_state) }).map_err(refused("run state"))?;
    fd.set_vcpu_events(&events_to_kvm(&state.events, state.rflags)).map_err(refused("pending events"))?;
    // Tells the guest's watchdogs that it stood still. Only guests that use kvm-clock can be told.
    let _ = fd.kvmclock_ctrl();
    Ok(())
}

/// Reads general, segment, table and control registers into `state`.
pub(super) fn save_registers(fd: &VcpuFd, state: &mut CpuState) -> Result<()> {
    let regs = fd.get_regs().map_err(host("cannot get the vCPU's registers"))?;
    let sregs = fd.get_sregs().map_err(host("cannot get the vCPU's system registers"))?;
    regs_from_kvm(&regs, state);
    sregs_from_kvm(&sregs, state);
    Ok(())
}

/// Loads what [`save_registers`] reads, but CR8 and the APIC base.
pub(super) fn load_registers(fd: &VcpuFd, state: &CpuState) -> Result<()> {
    let mut sregs = fd.get_sregs().map_err(host("cannot get the vCPU's system registers"))?;
    sregs_to_kvm(state, &mut sregs);
    fd.set_sregs(&sregs).map_err(refused("segment and control registers"))?;
    fd.set_regs(&regs_to_kvm(state)).map_err(refused("general registers"))
}

fn regs_from_kvm(r: &kvm_regs, state: &mut CpuState) {
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
}

fn regs_to_kvm(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u32::from(value & 1) << at;
    let attributes = u32::from(s.type_ & 15)
        | bit(s.s, 4)
        | u32::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15)
        | if s.unusable != 0 { Segment::UNUSABLE } else { 0 };
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let bit = |at: u32| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 15) as u8,
        present: bit(7),
        dpl: (s.attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: bit(Segment::UNUSABLE.trailing_zeros()),
        padding: 0,
    }
}

fn sregs_from_kvm(s: &kvm_sregs, state: &mut CpuState) {
    let table = |t: &kvm_dtable| Table { base: t.base, limit: t.limit };
    for (index, segment) in [
        (seg::ES, &s.es),
        (seg::CS, &s.cs),
        (seg::SS, &s.ss),
        (seg::DS, &s.ds),
        (seg::FS, &s.fs),
        (seg::GS, &s.gs),
    ] {
        state.segments[index] = segment_from_kvm(segment);
    }
    state.ldtr = segment_from_kvm(&s.ldt);
    state.tr = segment_from_kvm(&s.tr);
    state.gdtr = table(&s.gdt);
    state.idtr = table(&s.idt);
    (state.cr0, state.cr2, state.cr3, state.cr4, state.cr8) = (s.cr0, s.cr2, s.cr3, s.cr4, s.cr8);
    state.efer = s.efer;
    state.apic_base = s.apic_base;
}

/// All but CR8 and the APIC base, which stay.
fn sregs_to_kvm(state: &CpuState, s: &mut kvm_sregs) {
    let table = |t: &Table| kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] };
    let segment = |index: usize| segment_to_kvm(&state.segments[index]);
    (s.es, s.cs, s.ss) = (segment(seg::ES), segment(seg::CS), segment(seg::SS));
    (s.ds, s.fs, s.gs) = (segment(seg::DS), segment(seg::FS), segment(seg::GS));
    s.ldt = segment_to_kvm(&state.ldtr);
    s.tr = segment_to_kvm(&state.tr);
    s.gdt = table(&state.gdtr);
    s.idt = table(&state.idtr);
    (s.cr0, s.cr2, s.cr3, s.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    s.efer = state.efer;
    // An interrupt in flight is among the pending events.
    s.interrupt_bitmap = [0; 4];
}

fn mp_from_kvm(mp_state: u32) -> Result<MpState> {
    match mp_state {
        // After a SIPI the vCPU has its start address already.
        KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_SIPI_RECEIVED => Ok(MpState::Runnable),
        KVM_MP_STATE_UNINITIALIZED => Ok(MpState::Uninitialized),
        KVM_MP_STATE_INIT_RECEIVED => Ok(MpState::InitReceived),
        KVM_MP_STATE_HALTED => Ok(MpState::Halted),
        other => Err(Error::Unsupported(format!("a vCPU in run state {other} cannot be saved"))),
    }
}

fn mp_to_kvm(state: MpState) -> u32 {
    match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        MpState::Halted => KVM_MP_STATE_HALTED,
    }
}

/// Events that an instruction raises (INT n, INT3, INTO) are left out: RIP is still at the instruction, which will
/// raise them again.
fn events_from_kvm(e: &kvm_vcpu_events) -> Events {
    let x = &e.exception;
    let raised = (x.injected != 0 || x.pending != 0) && !SOFT_EXCEPTIONS.contains(&x.nr);
    let error = (x.has_error_code != 0).then_some(x.error_code);
    let i = &e.interrupt;
    Events {
        exception: raised.then_some((x.nr, error)),
        interrupt: (i.injected != 0 && i.soft == 0).then_some(i.nr),
        shadow: i.shadow != 0,
        // One that was about to be delivered masks others only once it is.
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
    }
}

fn events_to_kvm(e: &Events, rflags: u64) -> kvm_vcpu_events {
    let mut out = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some((nr, error)) = e.exception {
        out.exception.injected = 1;
        out.exception.nr = nr;
        out.exception.has_error_code = u8::from(error.is_some());
        out.exception.error_code = error.unwrap_or(0);
    }
    if let Some(nr) = e.interrupt {
        out.interrupt.injected = 1;
        out.interrupt.nr = nr;
    }
    if e.shadow {
        // The processor refuses a STI shadow with interrupts off (Intel SDM vol. 3, 27.3.1.5).
        let kind = if rflags & INTERRUPTS != 0 { KVM_X86_SHADOW_INT_STI } else { KVM_X86_SHADOW_INT_MOV_SS };
        out.interrupt.shadow = kind as u8;
    }
    out.nmi.pending = u8::from(e.nmi_pending);
    out.nmi.masked = u8::from(e.nmi_masked);
    out
}

/// What can be said of an XSAVE area before KVM looks at it. `room` is the size of this host's.
fn check_xsave(area: &[u8], room: usize) -> Result<()> {
    if area.len() < XSAVE_LEAST {
        return Err(Error::BadState(format!("an XSAVE area of {} bytes is too short", area.len())));
    }
    // Nothing but initial state may lie beyond what this host has.
    if area.get(room..).is_some_and(|tail| tail.iter().any(|&b| b != 0)) {
        return Err(Error::BadState("it uses vector registers that this host does not have".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::gpr;

    #[test]
    fn registers_keep_their_places() {
        let mut state = CpuState::default();
        for (i, r) in state.gpr.iter_mut().enumerate() {
            *r = 100 + i as u64;
        }
        (state.rip, state.rflags) = (0xfff0, 2);
        let regs = regs_to_kvm(&state);
        assert_eq!((regs.rbx, regs.rsp, regs.rdi), (103, 104, 107));
        let mut back = CpuState::default();
        regs_from_kvm(&regs, &mut back);
        assert_eq!(back, state);
        assert_eq!(back.gpr[gpr::RSI], 106);
    }

    #[test]
    fn segments_are_translated_bit_by_bit() {
        // 64-bit code, DPL 3; and a null segment.
        let code = Segment {
            selector: 0x33,
            base: 1 << 40,
            limit: 0xffff_ffff,
            attributes: 0xb | 1 << 4 | 3 << 5 | 1 << 7 | 1 << 13 | 1 << 15,
        };
        let kvm = segment_to_kvm(&code);
        assert_eq!((kvm.type_, kvm.s, kvm.dpl, kvm.present, kvm.l, kvm.db, kvm.g), (11, 1, 3, 1, 1, 0, 1));
        assert_eq!(segment_from_kvm(&kvm), code);
        let null = Segment { attributes: Segment::UNUSABLE, ..Default::default() };
        assert_eq!(segment_to_kvm(&null).unusable, 1);
        assert_eq!(segment_from_kvm(&segment_to_kvm(&null)), null);
    }

    #[test]
    fn system_registers_round_trip() {
        let mut state =
            CpuState { cr0: 0x8005_0033, cr2: 5, cr3: 0x1000, cr4: 0x6f0, efer: 0xd01, ..Default::default() };
        for (i, s) in state.segments.iter_mut().enumerate() {
            s.selector = i as u16 * 8;
        }
        state.tr.selector = 0x40;
        state.ldtr.selector = 0x48;
        state.gdtr = Table { base: 0xffff_fe00_0000_1000, limit: 0x7f };
        state.idtr = Table { base: 1, limit: 0xfff };
        let mut kvm =
            kvm_sregs { cr8: 3, apic_base: 0xfee0_0900, interrupt_bitmap: [1; 4], ..Default::default() };
        sregs_to_kvm(&state, &mut kvm);
        assert_eq!((kvm.cs.selector, kvm.ss.selector, kvm.ds.selector), (8, 16, 24));
        assert_eq!((kvm.cr8, kvm.interrupt_bitmap), (3, [0; 4]));
        let mut back = CpuState::default();
        sregs_from_kvm(&kvm, &mut back);
        (state.cr8, state.apic_base) = (3, 0xfee0_0900);
        assert_eq!(back, state);
    }

    #[test]
    fn events_in_flight_survive() {
        let all = Events {
            exception: Some((14, Some(2))),
            interrupt: Some(0x41),
            shadow: true,
            nmi_pending: true,
            nmi_masked: true,
        };
        assert_eq!(events_from_kvm(&events_to_kvm(&all, INTERRUPTS)), all);
        assert_eq!(events_from_kvm(&events_to_kvm(&Events::default(), 0)), Events::default());
        assert_eq!(events_to_kvm(&all, INTERRUPTS).interrupt.shadow, KVM_X86_SHADOW_INT_STI as u8);
        assert_eq!(events_to_kvm(&all, 0).interrupt.shadow, KVM_X86_SHADOW_INT_MOV_SS as u8);
    }

    #[test]
    fn what_the_instruction_will_raise_again_is_not_saved() {
        let mut e = kvm_vcpu_events::default();
        (e.interrupt.injected, e.interrupt.soft, e.interrupt.nr) = (1, 1, 0x80);
        (e.exception.injected, e.exception.nr) = (1, 3);
        (e.nmi.injected, e.nmi.masked) = (1, 1);
        let expected = Events { nmi_pending: true, ..Default::default() };
        assert_eq!(events_from_kvm(&e), expected);
    }

    #[test]
    fn xsave_areas_are_looked_at() {
        assert!(check_xsave(&[0; 575], 4096).is_err());
        assert!(check_xsave(&[0; 576], 4096).is_ok());
        let mut long = vec![0; 8192];
        assert!(check_xsave(&long, 4096).is_ok());
        long[4096] = 1;
        assert!(check_xsave(&long, 4096).is_err());
        assert!(check_xsave(&long, 8192).is_ok());
    }

    #[test]
    fn run_states() {
        for s in [MpState::Runnable, MpState::Uninitialized, MpState::InitReceived, MpState::Halted] {
            assert_eq!(mp_from_kvm(mp_to_kvm(s)).unwrap(), s);
        }
        assert!(mp_from_kvm(9).is_err());
    }
}
