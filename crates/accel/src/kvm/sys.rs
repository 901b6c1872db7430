//! The ioctls that `kvm-ioctls` does not offer in the shape needed here.
#![allow(unsafe_code)] // system calls

use kvm_bindings::{kvm_ioeventfd, kvm_irqfd, kvm_xsave};
use libc::{_IO, _IOR, _IOW, _IOWR, Ioctl};
use std::io;
use std::os::fd::AsRawFd;

/// The ioctl type of `/dev/kvm`.
const KVMIO: u32 = 0xae;
const KVM_RUN: Ioctl = _IO(KVMIO, 0x80);
const KVM_GET_MSR_INDEX_LIST: Ioctl = _IOWR::<u32>(KVMIO, 0x02);
const KVM_IRQFD: Ioctl = _IOW::<kvm_irqfd>(KVMIO, 0x76);
const KVM_IOEVENTFD: Ioctl = _IOW::<kvm_ioeventfd>(KVMIO, 0x79);
const KVM_GET_XSAVE: Ioctl = _IOR::<kvm_xsave>(KVMIO, 0xa4);
const KVM_SET_XSAVE: Ioctl = _IOW::<kvm_xsave>(KVMIO, 0xa5);
const KVM_GET_XSAVE2: Ioctl = _IOR::<kvm_xsave>(KVMIO, 0xcf);

/// Size of the area that `KVM_GET_XSAVE` fills: the smallest that KVM deals with, in bytes.
pub(super) const XSAVE_MIN: usize = size_of::<kvm_xsave>();

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `KVM_RUN` on a vCPU.
#[inline]
pub(super) fn run(vcpu: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: takes no argument; what the guest can reach is memory that the VM's slots keep mapped.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_RUN, 0) })
}

/// `KVM_IOEVENTFD` on a VM.
pub(super) fn ioeventfd(vm: &impl AsRawFd, request: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: the kernel reads one struct of the size in the request number.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IOEVENTFD, std::ptr::from_ref(request)) })
}

/// `KVM_IRQFD` on a VM.
pub(super) fn irqfd(vm: &impl AsRawFd, request: &kvm_irqfd) -> io::Result<()> {
    // SAFETY: as above.
    check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IRQFD, std::ptr::from_ref(request)) })
}

/// `KVM_GET_MSR_INDEX_LIST` on `/dev/kvm`, of any length.
pub(super) fn msr_index_list(kvm: &impl AsRawFd) -> io::Result<Vec<u32>> {
    let mut capacity = 256;
    loop {
        // The first word is the count: capacity on the way in, length on the way out (also when it does not fit).
        let mut list = vec![0u32; capacity + 1];
        list[0] = capacity as u32;
        // SAFETY: the kernel writes the count and at most `list[0]` indices, for which there is room.
        let result =
            check(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_MSR_INDEX_LIST, list.as_mut_ptr()) });
        let count = list[0] as usize;
        match result {
            Ok(()) => {
                list.truncate(count + 1);
                list.remove(0);
                return Ok(list);
            }
            Err(e) if e.raw_os_error() == Some(libc::E2BIG) && count > capacity && count < 1 << 16 => {
                capacity = count
            }
            Err(e) => return Err(e),
        }
    }
}

/// The XSAVE area of a vCPU in standard format. `size` is what `KVM_CAP_XSAVE2` says of the VM (0 if it is unknown
/// there), so that the kernel never writes more.
pub(super) fn get_xsave(vcpu: &impl AsRawFd, size: usize) -> io::Result<Vec<u8>> {
    let mut area = vec![0u8; size.max(XSAVE_MIN)];
    let request = if size > XSAVE_MIN { KVM_GET_XSAVE2 } else { KVM_GET_XSAVE };
    // SAFETY: KVM_GET_XSAVE writes XSAVE_MIN bytes, KVM_GET_XSAVE2 the size that the capability tells.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), request, area.as_mut_ptr()) })?;
    Ok(area)
}

/// Sets the XSAVE area of a vCPU. `area` is padded to what the kernel may read (see [`get_xsave`] on `size`).
pub(super) fn set_xsave(vcpu: &impl AsRawFd, area: &[u8], size: usize) -> io::Result<()> {
    let mut padded = area.to_vec();
    padded.resize(area.len().max(size).max(XSAVE_MIN), 0);
    // SAFETY: the kernel reads at most max(XSAVE_MIN, KVM_CAP_XSAVE2) bytes.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, padded.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel_header() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_GET_MSR_INDEX_LIST, 0xc004_ae02);
        assert_eq!(KVM_IRQFD, 0x4020_ae76);
        assert_eq!(KVM_IOEVENTFD, 0x4040_ae79);
        assert_eq!(KVM_GET_XSAVE, 0x9000_aea4);
        assert_eq!(KVM_SET_XSAVE, 0x5000_aea5);
        assert_eq!(KVM_GET_XSAVE2, 0x9000_aecf);
    }
}
