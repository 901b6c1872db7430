//! Which model-specific registers belong to a saved vCPU, and moving them.

use super::host;
use crate::{Error, Result};
use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// IA32_TSC_DEADLINE: arms a timer, so it is loaded after the TSC and the APIC.
const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MISC_ENABLE.
pub(super) const MISC_ENABLE: u32 = 0x1a0;

/// Memory types: state, but on many kernels not in `KVM_GET_MSR_INDEX_LIST`.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e,
    0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// Whether an MSR of KVM's list is part of a saved state.
fn is_state(msr: u32) -> bool {
    !matches!(
        msr,
        // In the state elsewhere: APIC base, EFER, FS and GS base.
        0x1b | 0xc000_0080 | 0xc000_0100 | 0xc000_0101
        // Properties of the processor: microcode revision, platform information, ARCH_CAPABILITIES,
        // PERF_CAPABILITIES, VMX capabilities, DE_CFG.
        | 0x8b | 0xce | 0x10a | 0x345 | 0x480..=0x491 | 0xc001_1029
        // Commands rather than registers: clearing overflow bits (Intel, AMD).
        | 0x390 | 0xc000_0302
        // System management mode, which is not offered: SMI count, SMBASE.
        | 0x34 | 0x9e
        // Hyper-V's, which are not offered.
        | 0x4000_0000..=0x4000_01ff
    )
}

/// The MSRs to save, of those that `vcpu` can read.
pub(super) fn list(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>> {
    let what = "cannot get the list of MSRs from KVM";
    let mut all =
        super::sys::msr_index_list(kvm).map_err(|source| Error::Host { what: what.into(), source })?;
    all.extend(MTRRS);
    let mut seen = std::collections::HashSet::new();
    all.retain(|&msr| is_state(msr) && seen.insert(msr));
    // The timer last; the rest in the kernel's order.
    all.sort_by_key(|&msr| msr == TSC_DEADLINE);
    Ok(read(vcpu, &all)?.into_iter().map(|(msr, _)| msr).collect())
}

/// Reads MSRs, leaving out those that cannot be read.
pub(super) fn read(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut out = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = pack(&entries)?;
        // The kernel stops at the first that it cannot read.
        let done = vcpu.get_msrs(&mut msrs).map_err(host("cannot read the vCPU's MSRs"))?.min(batch.len());
        out.extend(msrs.as_slice()[..done].iter().map(|e| (e.index, e.data)));
        let skip = usize::from(done < batch.len());
        rest = &rest[done + skip..];
    }
    Ok(out)
}

/// Writes MSRs in order, but the timer last. An MSR that this host does not have may be left out if it is zero.
pub(super) fn write(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<()> {
    let mut entries: Vec<_> =
        msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    entries.sort_by_key(|e| e.index == TSC_DEADLINE);
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let done = vcpu.set_msrs(&pack(batch)?).map_err(host("cannot write the vCPU's MSRs"))?;
        match batch.get(done) {
            None => rest = &rest[batch.len()..],
            Some(e) if e.data == 0 => rest = &rest[done + 1..],
            Some(e) => {
                return Err(Error::BadState(format!(
                    "this host does not take {:#x} in MSR {:#x}",
                    e.data, e.index
                )));
            }
        }
    }
    Ok(())
}

fn pack(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| Error::BadState("too many MSRs".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_keeps_state_and_drops_the_rest() {
        // TSC, STAR, kvm-clock, PAT, SPEC_CTRL, MISC_ENABLE, TSC_DEADLINE, MTRR default type.
        for msr in [0x10, 0xc000_0081, 0x4b56_4d01, 0x277, 0x48, MISC_ENABLE, TSC_DEADLINE, 0x2ff] {
            assert!(is_state(msr), "{msr:#x}");
        }
        for msr in [0x1b, 0xc000_0080, 0x10a, 0x485, 0x4000_0020, 0x9e] {
            assert!(!is_state(msr), "{msr:#x}");
        }
        assert!(MTRRS.iter().all(|&m| is_state(m)));
    }
}
