//! The table of checks, and one file for each group of them.

mod devices;
mod firmware;
mod kvm;
mod limits;
mod memory;
mod processor;
mod system;

use crate::{Finding, Host};

/// A check looks at one thing.
pub(crate) type Check = fn(&Host) -> Finding;

/// Every check, in the order of the report. A new one is one more line.
pub(crate) const ALL: &[Check] = &[
    system::kernel,
    processor::virtualization,
    processor::nested_paging,
    kvm::device,
    kvm::accelerator,
    kvm::nested,
    system::clock,
    memory::available,
    memory::huge_pages,
    memory::transparent_huge_pages,
    memory::merging,
    memory::numa,
    devices::tun,
    devices::vhost_net,
    devices::vhost_vsock,
    devices::vfio,
    devices::iommu,
    limits::open_files,
    limits::locked_memory,
    system::io_uring,
    system::sandbox,
    system::cgroups,
    firmware::seabios,
    firmware::ovmf,
];
