//! PCI's address windows as firmware has arranged them, for the ACPI tables.

use crate::acpi::{self, AcpiConfig, Blob};
use bus::pci::{BarKind, PciBus};
use devices::chipset::EcamPlace;
use memory::{GuestMemory, MMIO_HOLE_END};
use std::sync::Arc;

const GIB: u64 = 1 << 30;
/// The window above 4 GiB is at least this large.
const LARGE_WINDOW: u64 = 32 * GIB;

/// What of PCI firmware may place.
#[derive(Clone)]
pub(crate) struct PciView {
    pub(crate) bus: Arc<PciBus>,
    /// Where the configuration window is; none on boards without one.
    pub(crate) ecam: Option<EcamPlace>,
    /// What may belong to PCI below 4 GiB.
    pub(crate) low: std::ops::Range<u64>,
}

impl PciView {
    /// The windows below 4 GiB, always two, so that the length of the tables does not depend on where they are.
    fn low_windows(&self, ecam: Option<(u64, u64)>) -> Vec<(u32, u32)> {
        let (start, end) = (self.low.start, self.low.end);
        let inside = ecam.filter(|(base, len)| *base >= start && base + len <= end && *len > 0);
        let parts = match inside {
            Some((base, len)) => [(start, base), (base + len, end)],
            None => [(start, start), (start, end)],
        };
        let open: Vec<(u64, u64)> = parts.into_iter().filter(|(a, b)| a < b).collect();
        let open = match open[..] {
            [(a, b)] => {
                let middle = (a + (b - a) / 2) & !0xffff;
                vec![(a, middle), (middle, b)]
            }
            _ => open,
        };
        open.into_iter().map(|(a, b)| (a as u32, (b - 1) as u32)).collect() // below 4 GiB
    }

    /// The window above 4 GiB: around the BARs that are there, behind RAM.
    fn high_window(&self, memory: &GuestMemory) -> (u64, u64) {
        let ram_end = memory.regions().iter().map(|r| r.start + r.len()).max().unwrap_or(0);
        let floor = ram_end.max(MMIO_HOLE_END).next_multiple_of(GIB);
        let (mut first, mut end) = (u64::MAX, 0);
        for function in self.bus.all_functions() {
            let function = function.lock().unwrap_or_else(|e| e.into_inner());
            for n in 0..6 {
                let bar = function.config().bar(n).filter(|b| b.kind == BarKind::Memory64);
                if let (Some(bar), Some(at)) = (bar, function.config().bar_address(n))
                    && at >= MMIO_HOLE_END
                {
                    first = first.min(at);
                    end = end.max(at + bar.size);
                }
            }
        }
        let start = if end == 0 { floor } else { first & !(GIB - 1) };
        (start, end.next_multiple_of(GIB).max(start + LARGE_WINDOW) - 1)
    }
}

/// What builds the tables with everything where it is when it is called.
pub(super) fn tables_now(
    config: &AcpiConfig,
    view: &Option<PciView>,
    memory: &GuestMemory,
) -> impl Fn() -> Blob + Send + 'static + use<> {
    let (config, view, memory) = (config.clone(), view.clone(), memory.clone());
    move || {
        let mut config = config.clone();
        if let (Some(view), Some(pci)) = (&view, &mut config.pci) {
            let ecam = view.ecam.as_ref().map(EcamPlace::get).filter(|(_, buses)| *buses > 0);
            if let Some((base, buses)) = ecam {
                (pci.ecam_base, pci.buses) = (base, buses);
            }
            pci.mmio32 = view.low_windows(ecam.map(|(base, buses)| (base, u64::from(buses) << 20)));
            pci.mmio64 = view.high_window(&memory);
        }
        acpi::build(&config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bus::Bus;
    use memory::{Backing, Layout};

    #[test]
    fn windows_go_around_the_configuration_space() {
        let bus = PciBus::root(Arc::new(Bus::new()), vec![]);
        let view = PciView { bus, ecam: None, low: 0xb000_0000..0xfec0_0000 };
        let around = |ecam| view.low_windows(ecam);
        assert_eq!(
            around(Some((0xe000_0000, 256 << 20))),
            [(0xb000_0000, 0xdfff_ffff), (0xf000_0000, 0xfebf_ffff)]
        );
        for ecam in [Some((0xb000_0000, 256 << 20)), None, Some((0, 1 << 20))] {
            let windows = around(ecam);
            assert_eq!((windows.len(), windows[0].1 + 1, windows[1].1), (2, windows[1].0, 0xfebf_ffff));
        }
        let memory =
            GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &Backing::Anonymous, false).unwrap();
        assert_eq!(view.high_window(&memory), (4 * GIB, 36 * GIB - 1));
    }
}
