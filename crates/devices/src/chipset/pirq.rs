//! PCI interrupt routing: each PIRQ goes to an input of its own of the IOAPIC, where there is one for it, and to the ISA
//! interrupt that the bridge's register names, for systems that use the 8259s (Intel ICH9 datasheet, 13.1.13).

use accel::Irqs;
use bus::{IrqLine, IrqPin};
use std::sync::{Arc, Mutex, MutexGuard};

/// Routing register: interrupts are not routed to the 8259s.
pub const ROUTE_OFF: u8 = 1 << 7;

/// Where the PIRQs of a bridge go. As an interrupt sink it takes GSI `first + n` for PIRQ n and, where the chipset has
/// IOAPIC inputs for PIRQs, passes it on.
pub struct PirqRouter {
    first: u32,
    apic: Option<Arc<dyn Irqs>>,
    isa: Vec<Arc<IrqPin>>,
    routes: Mutex<Vec<Route>>,
}

struct Route {
    register: u8,
    level: bool,
    line: IrqLine,
}

impl PirqRouter {
    /// `count` PIRQs that arrive as GSIs from `first` up; `apic` has inputs for them, `isa` are interrupts 0 to 15.
    pub fn new(first: u32, count: usize, apic: Option<Arc<dyn Irqs>>, isa: Vec<Arc<IrqPin>>) -> Arc<Self> {
        let routes =
            (0..count).map(|_| Route { register: ROUTE_OFF, level: false, line: IrqLine::unconnected() });
        Arc::new(Self { first, apic, isa, routes: Mutex::new(routes.collect()) })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Route>> {
        self.routes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sets the routing register of PIRQ `n`.
    pub fn route(&self, n: usize, register: u8) {
        let mut routes = self.lock();
        let Some(route) = routes.get_mut(n).filter(|r| r.register != register) else { return };
        route.line.set(false);
        route.register = register;
        let pin = (register & ROUTE_OFF == 0).then(|| self.isa.get(usize::from(register & 0xf))).flatten();
        route.line = pin.map_or_else(IrqLine::unconnected, |p| p.line());
        route.line.set(route.level);
    }
}

impl Irqs for PirqRouter {
    fn set_line(&self, gsi: u32, level: bool) {
        if let Some(apic) = &self.apic {
            apic.set_line(gsi, level);
        }
        let mut routes = self.lock();
        let n = gsi.checked_sub(self.first).and_then(|n| routes.get_mut(n as usize));
        if let Some(route) = n {
            route.level = level;
            route.line.set(level);
        }
    }

    fn msi(&self, address: u64, data: u32) {
        if let Some(apic) = &self.apic {
            apic.msi(address, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Wires(Mutex<Vec<(u32, bool)>>);

    impl Irqs for Wires {
        fn set_line(&self, gsi: u32, level: bool) {
            self.0.lock().unwrap().push((gsi, level));
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    #[test]
    fn routes_to_both_controllers() {
        let wires = Arc::new(Wires::default());
        let isa = (0..16).map(|gsi| IrqPin::new(wires.clone(), gsi)).collect();
        let router = PirqRouter::new(16, 8, Some(wires.clone()), isa);
        let seen = || std::mem::take(&mut *wires.0.lock().unwrap());
        router.set_line(17, true);
        assert_eq!(seen(), [(17, true)]);
        router.route(1, 10);
        router.route(2, 10);
        assert_eq!(seen(), [(10, true)], "a level that is up is seen");
        router.set_line(18, true);
        router.set_line(17, false);
        assert_eq!(seen(), [(18, true), (17, false)], "shared");
        router.route(2, 11);
        assert_eq!(seen(), [(10, false), (11, true)]);
        router.route(2, ROUTE_OFF | 11);
        assert_eq!(seen(), [(11, false)]);
        router.set_line(99, true);
        router.route(99, 3);
    }
}
