//! CPUID to and from KVM, and what of it guests may be promised.

use super::host;
use crate::{Cpuid, CpuidEntry, Error, Result};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

// Leaf 1 ECX.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
// Leaf 1 EDX.
const HTT: u32 = 1 << 28;
// Leaf 7.0 ECX.
const OSPKE: u32 = 1 << 4;

/// What KVM can give a guest on this host.
pub(super) fn supported(kvm: &Kvm) -> Result<Cpuid> {
    let list = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(host("cannot get the CPUID that KVM supports"))?;
    let mut cpuid = Cpuid { entries: list.as_slice().iter().map(entry).collect() };
    adjust(&mut cpuid, kvm.check_extension(Cap::TscDeadlineTimer));
    Ok(cpuid)
}

fn entry(e: &kvm_cpuid_entry2) -> CpuidEntry {
    let indexed = e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    let (leaf, subleaf) = (e.function, if indexed { e.index } else { 0 });
    CpuidEntry { leaf, subleaf, indexed, eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx }
}

/// Completes KVM's list with what it leaves to user space (api.rst, `KVM_GET_SUPPORTED_CPUID`) and takes out what
/// belongs to one processor of this host or changes while the guest runs.
fn adjust(cpuid: &mut Cpuid, tsc_deadline: bool) {
    let features = cpuid.entry(1, 0, false);
    // The APIC is the kernel's, which has both whatever the processor has.
    features.ecx |= HYPERVISOR | X2APIC;
    features.ecx &= !(OSXSAVE | TSC_DEADLINE);
    if tsc_deadline {
        features.ecx |= TSC_DEADLINE;
    }
    // Initial APIC ID and number of logical processors.
    features.ebx &= 0xffff;
    features.edx &= !HTT;
    for e in &mut cpuid.entries {
        match e.leaf {
            7 if e.subleaf == 0 => e.ecx &= !OSPKE,
            // Caches stay; who shares them is topology.
            4 => e.eax &= 0x3fff,
            0x8000_001d => e.eax &= 0x3fff,
            // Physical threads and the size of the APIC ID's core part.
            0x8000_0008 => e.ecx &= !0xf0ff,
            _ => {}
        }
    }
    for topology in [0xb, 0x1f, 0x8000_001e] {
        cpuid.remove(topology);
    }
}

/// Gives a vCPU its CPUID.
pub(super) fn set(vcpu: &VcpuFd, cpuid: &Cpuid) -> Result<()> {
    let entries: Vec<_> = cpuid
        .entries
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf,
            flags: if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Default::default()
        })
        .collect();
    let list = CpuId::from_entries(&entries).map_err(|_| {
        Error::Unsupported(format!(
            "a CPU model of {} CPUID leaves: KVM takes at most {KVM_MAX_CPUID_ENTRIES}",
            entries.len()
        ))
    })?;
    vcpu.set_cpuid2(&list).map_err(host("KVM refuses the CPU model (CPUID)"))
}

/// Whether the vendor string is Intel's.
pub(super) fn is_intel(cpuid: &Cpuid) -> bool {
    let [_, b, c, d] = cpuid.query(0, 0);
    [b, d, c].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_run_time_facts_are_taken_out() {
        let mut c = Cpuid::default();
        *c.entry(1, 0, false) =
            CpuidEntry { leaf: 1, ebx: 0x0710_0800, ecx: OSXSAVE | 1, edx: HTT | 1, ..Default::default() };
        c.entry(4, 0, true).eax = 0x7c00_4121;
        c.entry(7, 0, true).ecx = OSPKE | 4;
        c.entry(7, 1, true).ecx = OSPKE;
        c.entry(0xb, 0, true).edx = 7;
        c.entry(0x8000_0008, 0, false).ecx = 0x0000_700f;
        c.entry(0x4000_0001, 0, false).eax = 0x0100_7efb;
        adjust(&mut c, true);
        assert_eq!(c.query(1, 0), [0, 0x0800, HYPERVISOR | X2APIC | TSC_DEADLINE | 1, 1]);
        assert_eq!(c.query(4, 0)[0], 0x121);
        assert_eq!(c.query(7, 0)[2], 4);
        assert_eq!(c.query(7, 1)[2], OSPKE, "another subleaf's bit 4 is another thing");
        assert!(c.get(0xb, 0).is_none());
        assert_eq!(c.query(0x8000_0008, 0)[2], 0);
        assert_eq!(c.query(0x4000_0001, 0)[0], 0x0100_7efb);
        adjust(&mut c, false);
        assert_eq!(c.query(1, 0)[2] & TSC_DEADLINE, 0);
    }

    #[test]
    fn vendors() {
        let mut c = Cpuid::default();
        assert!(!is_intel(&c));
        let e = c.entry(0, 0, false);
        (e.ebx, e.edx, e.ecx) = (0x756e_6547, 0x4965_6e69, 0x6c65_746e);
        assert!(is_intel(&c));
    }
}
