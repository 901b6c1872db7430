//! A vCPU's descriptor and the page that it shares with the kernel (`struct kvm_run`).
#![allow(unsafe_code)] // shared memory, unions

use super::sys;
use kvm_bindings::{KVM_EXIT_IO_OUT, kvm_debug_exit_arch, kvm_run};
use kvm_ioctls::VcpuFd;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

/// A vCPU's descriptor with its run page. The kernel writes to the page only inside [`Self::enter`].
pub(super) struct Runner {
    fd: VcpuFd,
    run: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the pointer is to a mapping that `fd` owns and that goes with it; no thread is special to it.
unsafe impl Send for Runner {}

/// A port access: one or more transfers of `size` bytes at one port.
pub(super) struct PortAccess<'a> {
    pub(super) write: bool,
    pub(super) port: u16,
    pub(super) size: usize,
    pub(super) data: &'a mut [u8],
}

/// A memory access of at most 8 bytes.
pub(super) struct MmioAccess<'a> {
    pub(super) write: bool,
    pub(super) gpa: u64,
    pub(super) data: &'a mut [u8],
}

impl Runner {
    /// `len` is the length of the run page's mapping in bytes (`KVM_GET_VCPU_MMAP_SIZE`).
    pub(super) fn new(mut fd: VcpuFd, len: usize) -> Self {
        let run = NonNull::from(fd.get_kvm_run());
        Self { fd, run, len }
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The flag that makes `KVM_RUN` finish pending accesses and return at once.
    #[inline]
    pub(super) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: in the mapping, for as long as `self`; it is only ever accessed atomically (the kernel reads it).
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }

    /// Runs the guest until the kernel has something for us.
    #[inline]
    pub(super) fn enter(&mut self) -> io::Result<()> {
        sys::run(&self.fd)
    }

    /// Why [`Self::enter`] returned.
    #[inline]
    pub(super) fn reason(&self) -> u32 {
        // SAFETY: in the mapping; the kernel writes it only inside `enter`.
        unsafe { (&raw const (*self.run.as_ptr()).exit_reason).read_volatile() }
    }

    /// The access of a `KVM_EXIT_IO`; `None` if the kernel's description of it does not fit the page.
    #[inline]
    pub(super) fn port_access(&mut self) -> Option<PortAccess<'_>> {
        // SAFETY: plain integers in the mapping, every pattern of which is valid.
        let io = unsafe { (*self.run.as_ptr()).__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let start = usize::try_from(io.data_offset).ok()?;
        let len = size.checked_mul(io.count as usize)?;
        if !matches!(size, 1 | 2 | 4) || start < size_of::<kvm_run>() || start.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: checked to lie in the mapping, behind `struct kvm_run`; `self` is borrowed for as long.
        let data = unsafe { std::slice::from_raw_parts_mut(self.run.as_ptr().cast::<u8>().add(start), len) };
        Some(PortAccess { write: u32::from(io.direction) == KVM_EXIT_IO_OUT, port: io.port, size, data })
    }

    /// The access of a `KVM_EXIT_MMIO`.
    #[inline]
    pub(super) fn mmio_access(&mut self) -> MmioAccess<'_> {
        // SAFETY: plain integers in the mapping; `self` is borrowed for as long as the reference lives.
        let mmio = unsafe { &mut (*self.run.as_ptr()).__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        MmioAccess { write: mmio.is_write != 0, gpa: mmio.phys_addr, data: &mut mmio.data[..len] }
    }

    /// Suberror and data words of a `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: plain integers in the mapping.
        let internal = unsafe { (*self.run.as_ptr()).__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        (internal.suberror, internal.data[..count].to_vec())
    }

    /// Hardware reason of a `KVM_EXIT_FAIL_ENTRY`.
    pub(super) fn entry_failure(&self) -> u64 {
        // SAFETY: plain integers in the mapping.
        unsafe { (*self.run.as_ptr()).__bindgen_anon_1.fail_entry.hardware_entry_failure_reason }
    }

    /// Type of a `KVM_EXIT_SYSTEM_EVENT`.
    pub(super) fn system_event(&self) -> u32 {
        // SAFETY: plain integers in the mapping.
        unsafe { (*self.run.as_ptr()).__bindgen_anon_1.system_event.type_ }
    }

    /// Hardware reason of a `KVM_EXIT_UNKNOWN`.
    pub(super) fn unknown(&self) -> u64 {
        // SAFETY: plain integers in the mapping.
        unsafe { (*self.run.as_ptr()).__bindgen_anon_1.hw.hardware_exit_reason }
    }

    /// Guest physical address of a `KVM_EXIT_MEMORY_FAULT`.
    pub(super) fn memory_fault(&self) -> u64 {
        // SAFETY: plain integers in the mapping.
        unsafe { (*self.run.as_ptr()).__bindgen_anon_1.memory_fault.gpa }
    }

    /// What a `KVM_EXIT_DEBUG` is about.
    pub(super) fn debug(&self) -> kvm_debug_exit_arch {
        // SAFETY: plain integers in the mapping.
        unsafe { (*self.run.as_ptr()).__bindgen_anon_1.debug.arch }
    }
}
