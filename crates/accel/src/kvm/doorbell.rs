//! ioeventfd and irqfd: doorbells that the kernel handles alone.

use super::{irq::Message, sys, vm::Inner};
use crate::{Doorbells, Error, IoAddress, IrqFd, Result};
use base::EventFd;
use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio, kvm_irqfd,
};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

/// The kernel's doorbells of a VM.
pub(super) struct KvmDoorbells(pub(super) Arc<Inner>);

impl KvmDoorbells {
    fn ioeventfd(
        &self,
        at: IoAddress,
        len: u32,
        datamatch: Option<u64>,
        fd: &EventFd,
        attach: bool,
    ) -> Result<()> {
        let mut flags = 0;
        if datamatch.is_some() {
            flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        }
        let addr = match at {
            IoAddress::Port(port) => {
                flags |= 1 << kvm_ioeventfd_flag_nr_pio;
                u64::from(port)
            }
            IoAddress::Mmio(gpa) => gpa,
        };
        if !attach {
            flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        }
        let request = kvm_ioeventfd {
            datamatch: datamatch.unwrap_or(0),
            addr,
            len,
            fd: fd.as_raw_fd(),
            flags,
            ..Default::default()
        };
        sys::ioeventfd(self.0.fd(), &request).map_err(|source| {
            let verb = if attach { "attach" } else { "detach" };
            Error::Host { what: format!("cannot {verb} a doorbell (ioeventfd) at {at:x?}"), source }
        })
    }
}

impl Doorbells for KvmDoorbells {
    fn attach(&self, at: IoAddress, len: u32, datamatch: Option<u64>, fd: &EventFd) -> Result<()> {
        self.ioeventfd(at, len, datamatch, fd, true)
    }

    fn detach(&self, at: IoAddress, len: u32, datamatch: Option<u64>, fd: &EventFd) -> Result<()> {
        self.ioeventfd(at, len, datamatch, fd, false)
    }

    fn irqfd(&self, fd: &EventFd) -> Result<Box<dyn IrqFd>> {
        let fd = fd
            .try_clone()
            .map_err(|source| Error::Host { what: "cannot duplicate an eventfd".into(), source })?;
        let gsi = self.0.routes().reserve()?;
        Ok(Box::new(KvmIrqFd { vm: self.0.clone(), fd, gsi, attached: Mutex::new(false) }))
    }
}

/// An eventfd that delivers a message. It is known to the kernel only while unmasked; an eventfd signalled meanwhile
/// delivers as soon as it is attached again, as a pending bit does.
struct KvmIrqFd {
    vm: Arc<Inner>,
    fd: EventFd,
    gsi: u32,
    attached: Mutex<bool>,
}

impl KvmIrqFd {
    fn attach(&self, attached: &mut bool, on: bool) -> Result<()> {
        if *attached == on {
            return Ok(());
        }
        let request = kvm_irqfd {
            fd: self.fd.as_raw_fd() as u32,
            gsi: self.gsi,
            flags: if on { 0 } else { KVM_IRQFD_FLAG_DEASSIGN },
            ..Default::default()
        };
        sys::irqfd(self.vm.fd(), &request).map_err(|source| {
            let verb = if on { "attach" } else { "detach" };
            Error::Host { what: format!("cannot {verb} an interrupt (irqfd)"), source }
        })?;
        *attached = on;
        Ok(())
    }
}

impl IrqFd for KvmIrqFd {
    fn route(&self, message: Option<(u64, u32)>) -> Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(|e| e.into_inner());
        // A message to nowhere is as good as a masked one.
        let message = message.and_then(|(address, data)| Message::new(address, data));
        if let Some(message) = message {
            self.vm.routes().set(self.vm.fd(), self.gsi, message)?;
        }
        self.attach(&mut attached, message.is_some())
    }
}

impl Drop for KvmIrqFd {
    fn drop(&mut self) {
        let mut attached = *self.attached.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(e) = self.attach(&mut attached, false) {
            // The GSI is kept out of use then, lest someone else's message be sent.
            tracing::warn!(error = %e, "an interrupt stays attached");
            return;
        }
        self.vm.routes().release(self.gsi);
    }
}
