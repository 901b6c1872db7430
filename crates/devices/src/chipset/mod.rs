//! The PC's own devices: interrupt controllers, timers, clock, serial port, keyboard controller, power management.
//!
//! The board builds them directly (`Pit::new(...)`); those a user can add by name are in the table of models too.
//! All of them count time by one [`Clock`], which the machine stops while the guest is paused.
//!
//! Lock order: a device's own lock, then the interrupt pin, then the 8259 pair or the IOAPIC. Local APICs have no lock
//! that is held while anything else is taken; the timer service's lock is a leaf.

pub mod acpi_reduced;
mod clock;
mod ioapic;
mod irqchip;
mod lapic;
mod lapic_timer;
mod legacy;
mod message;
mod pic;
pub mod pit;
pub mod pvpanic;

pub use clock::{Clock, ClockTimer};
pub use irqchip::{ApicCpu, Irqchip, IrqchipDevice};
pub use legacy::LegacyLine;
pub use pit::Pit;
