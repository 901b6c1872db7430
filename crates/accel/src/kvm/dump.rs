//! What to say when a vCPU cannot go on.

use super::state;
use super::vm::Inner;
use crate::CpuState;
use crate::state::seg;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuFd;
use memory::PAGE_SIZE;
use std::fmt::Write;

/// Code bytes shown before RIP and in all.
const BEFORE: u64 = 16;
const BYTES: usize = 32;

/// A sentence on a `KVM_EXIT_INTERNAL_ERROR`.
pub(super) fn internal_error(suberror: u32, data: &[u64]) -> String {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "emulation failure: KVM had to emulate an instruction and could not",
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception while another was delivered",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit of the processor that KVM did not expect",
        _ => "of a kind that is not known",
    };
    let mut out = format!("KVM internal error, suberror {suberror} ({what})");
    // Flags, then if they say so a count and up to 15 bytes of the instruction.
    let mut rest = data;
    if suberror == KVM_INTERNAL_ERROR_EMULATION
        && let [flags, bytes @ ..] = data
        && flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
        && bytes.len() >= 2
    {
        let raw: Vec<u8> = bytes.iter().take(2).flat_map(|word| word.to_le_bytes()).collect();
        let count = usize::from(raw[0]).min(15);
        let _ = write!(out, "; instruction {}", hex(&raw[1..=count]));
        rest = &bytes[2..];
    }
    if rest.iter().any(|&word| word != 0) {
        let words: Vec<_> = rest.iter().map(|word| format!("{word:#x}")).collect();
        let _ = write!(out, "; data {}", words.join(" "));
    }
    out
}

/// A sentence on a `KVM_EXIT_FAIL_ENTRY`, whose reason is VMX's or SVM's.
pub(super) fn entry_failure(reason: u64) -> String {
    let what = if reason >> 31 == 1 {
        // Intel SDM vol. 3, 27.8: a failed entry is an exit with bit 31 set.
        match reason & 0xffff {
            33 => "invalid guest state",
            34 => "an MSR that cannot be loaded",
            41 => "a machine check",
            _ => "a VM entry failure",
        }
    } else {
        match reason {
            // AMD APM vol. 2, 15.5.1: VMEXIT_INVALID is -1.
            u64::MAX => "an invalid guest state",
            // Intel SDM vol. 3, 31.4: VM-instruction error numbers.
            7 => "invalid control fields",
            8 => "invalid host state",
            26 => "events blocked by MOV SS",
            _ => "a reason of its own",
        }
    };
    format!("the processor refuses to run the guest: {what} (hardware reason {reason:#x})")
}

/// Registers and the code around RIP, for people.
pub(super) fn registers(fd: &VcpuFd, vm: &Inner) -> String {
    let mut s = CpuState::default();
    if let Err(e) = state::save_registers(fd, &mut s) {
        return e.to_string();
    }
    let mut out = format(&s);
    // In 64-bit mode the base of CS is zero.
    let rip = s.segments[seg::CS].base.wrapping_add(s.rip);
    let start = rip.wrapping_sub(BEFORE);
    let code: Vec<_> = (0..BYTES as u64).map(|i| start.wrapping_add(i)).collect();
    let bytes = read_linear(fd, vm, &code);
    if bytes.iter().all(Option::is_none) {
        let _ = write!(out, "\nCode: RIP is not in readable memory");
        return out;
    }
    out.push_str("\nCode:");
    for (at, byte) in code.into_iter().zip(bytes) {
        let text = byte.map_or("??".into(), |b| format!("{b:02x}"));
        let _ = if at == rip { write!(out, " <{text}>") } else { write!(out, " {text}") };
    }
    out
}

/// Bytes at linear addresses as the guest's page tables translate them.
fn read_linear(fd: &VcpuFd, vm: &Inner, addresses: &[u64]) -> Vec<Option<u8>> {
    let slots = vm.slots();
    let mut page: Option<(u64, Option<u64>)> = None;
    addresses
        .iter()
        .map(|&at| {
            let base = at & !(PAGE_SIZE - 1);
            let physical = match page {
                Some((known, physical)) if known == base => physical,
                _ => {
                    let found =
                        fd.translate_gva(base).ok().filter(|t| t.valid != 0).map(|t| t.physical_address);
                    page = Some((base, found));
                    found
                }
            };
            let mut byte = [0];
            (slots.read(physical? + (at - base), &mut byte) == 1).then_some(byte[0])
        })
        .collect()
}

fn format(s: &CpuState) -> String {
    const GPR: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
        "R14", "R15",
    ];
    const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];
    let mut out = String::new();
    for (row, names) in GPR.chunks(4).enumerate() {
        for (i, name) in names.iter().enumerate() {
            let _ = write!(out, "{name}={:016x} ", s.gpr[row * 4 + i]);
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    let _ = writeln!(out, "RIP={:016x} RFLAGS={:08x} EFER={:x}", s.rip, s.rflags, s.efer);
    let named = SEGMENTS.into_iter().zip(&s.segments).chain([("LDT", &s.ldtr), ("TR", &s.tr)]);
    for (name, x) in named {
        let _ =
            writeln!(out, "{name:3}={:04x} {:016x} {:08x} {:05x}", x.selector, x.base, x.limit, x.attributes);
    }
    let _ = writeln!(
        out,
        "GDT={:016x} {:04x} IDT={:016x} {:04x}",
        s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit
    );
    let _ = write!(
        out,
        "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x} CR8={:x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.cr8
    );
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulation_failures_show_the_instruction() {
        let mut raw = [0u8; 16];
        raw[..6].copy_from_slice(&[5, 0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
        let words: Vec<u64> = raw.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
        let text = internal_error(1, &[1, words[0], words[1], 0xdead]);
        assert!(text.contains("emulation failure"), "{text}");
        assert!(text.ends_with("instruction f0 48 0f c7 0f; data 0xdead"), "{text}");
        // A count beyond the 15 bytes, and fewer words than promised.
        assert!(internal_error(1, &[1, 0xff, 0]).contains("instruction 00"));
        assert!(!internal_error(1, &[1, 5]).contains("instruction f"));
        assert!(internal_error(3, &[]).contains("delivered"));
        assert!(internal_error(77, &[0, 1]).contains("not known"));
    }

    #[test]
    fn entry_failures_are_explained() {
        assert!(entry_failure(0x8000_0021).contains("invalid guest state (hardware reason 0x80000021)"));
        assert!(entry_failure(7).contains("control fields"));
        assert!(entry_failure(u64::MAX).contains("invalid guest state"));
    }

    #[test]
    fn the_dump_has_every_register() {
        let mut s = CpuState::default();
        s.gpr[15] = 0x1515;
        s.segments[seg::GS].base = 0xffff_8880_0000_0000;
        s.rip = 0xffff_ffff_8100_0000;
        let text = format(&s);
        assert!(text.contains("R15=0000000000001515\n"));
        assert!(text.contains("RIP=ffffffff81000000"));
        assert!(text.contains("GS =0000 ffff888000000000"));
        assert!(text.contains("TR "));
    }
}
