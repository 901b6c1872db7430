//! The VGA: any access to ports, registers and window; then whatever it shows.
#![no_main]

use accel::{Irqs, Slot, SlotId, Vcpu, VcpuConfig, Vm};
use bus::RamWindow;
use devices::display::vga::{Ports, Vga};
use libfuzzer_sys::fuzz_target;
use memory::{Backing, Region};
use std::sync::Arc;

struct NoVm;

fn no<T>() -> accel::Result<T> {
    Err(accel::Error::Unsupported("no VM".into()))
}

impl Vm for NoVm {
    fn vcpu(&self, _: VcpuConfig) -> accel::Result<Box<dyn Vcpu>> {
        no()
    }
    fn map(&self, _: Slot) -> accel::Result<SlotId> {
        no()
    }
    fn unmap(&self, _: SlotId) -> accel::Result<()> {
        no()
    }
    fn take_dirty(&self, _: SlotId, _: &mut dyn FnMut(u64)) -> accel::Result<()> {
        no()
    }
    fn set_dirty_log(&self, _: SlotId, _: bool) -> accel::Result<()> {
        no()
    }
    fn irqs(&self) -> Option<Arc<dyn Irqs>> {
        None
    }
    fn save(&self) -> accel::Result<Vec<u8>> {
        no()
    }
    fn load(&self, _: &[u8]) -> accel::Result<()> {
        no()
    }
}

fuzz_target!(|data: &[u8]| {
    let region = Region::new(0, 4 << 20, &Backing::Anonymous, false).expect("memory");
    let window = RamWindow::new("vga", Arc::new(NoVm), region, false, true);
    let mut vga = Vga::new(window);
    for step in data.as_chunks::<8>().0 {
        let value = &step[4..4 + usize::from(step[1] % 4) + 1];
        let mut buf = value.to_vec();
        let at = u16::from_le_bytes([step[2], step[3]]);
        match step[0] % 6 {
            0 => vga.write_port(Ports::VGA[usize::from(at) % 5].0 + at % 16, value),
            1 => vga.read_port(0x3c0 + at % 32, &mut buf),
            2 => vga.write_window(u64::from(at) * 2, value),
            3 => vga.read_window(u64::from(at) * 2, &mut buf),
            4 => vga.write_vbe(at % 12, u16::from_le_bytes([step[4], step[5]])),
            _ => _ = vga.read_vbe(at % 12),
        }
    }
    vga.draw(&mut display::Canvas::new());
});
