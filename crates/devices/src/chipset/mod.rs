//! The PC's own devices: interrupt controllers, timers, clock, serial port, keyboard controller, power management.
//!
//! The board builds them directly (`Pit::new(...)`); those a user can add by name are in the table of models too.
//! All of them count time by one [`Clock`], which the machine stops while the guest is paused.
//!
//! Lock order: a device's own lock, then the interrupt pin, then the 8259 pair or the IOAPIC. Local APICs have no lock
//! that is held while anything else is taken; the timer service's lock is a leaf.

mod acpi_pm;
mod acpi_reduced;
pub mod bridge;
mod calendar;
mod clock;
#[cfg(test)]
mod conformance;
pub mod debug_exit;
pub mod debugcon;
mod function;
pub mod fw_cfg;
mod hpet;
pub mod i6300esb;
mod i8042;
mod i8042_input;
mod ioapic;
mod irqchip;
mod lapic;
mod lapic_timer;
mod legacy;
mod lpc;
mod mch;
mod message;
mod output;
mod pflash;
mod pic;
mod piix;
mod pirq;
mod pit;
mod placed;
mod ports;
mod ps2;
pub mod pvpanic;
mod rtc;
pub mod serial;
mod shadow;
mod smbus;
pub mod tco;
#[cfg(test)]
mod testing;

pub use acpi_pm::AcpiPm;
pub use acpi_reduced::ReducedPower;
pub use clock::{Clock, ClockTimer};
pub use debug_exit::DebugExit;
pub use debugcon::DebugCon;
pub use fw_cfg::{FwCfg, FwCfgItems};
pub use hpet::Hpet;
pub use i8042::I8042;
pub use irqchip::{ApicCpu, Irqchip, IrqchipDevice};
pub use legacy::LegacyLine;
pub use lpc::{ChipsetRegisters, Lpc, LpcPreset};
pub use mch::{EcamPlace, MemoryController};
pub use pflash::Flash;
pub use piix::{Piix3, Piix4Pm};
pub use pirq::PirqRouter;
pub use pit::Pit;
pub use ports::SystemPorts;
pub use rtc::{Rtc, RtcBase};
pub use serial::Serial;
pub use shadow::{LEGACY_AREA, Shadow};
pub use smbus::{Ich9SmBus, SmBus};
pub use tco::NoReboot;
