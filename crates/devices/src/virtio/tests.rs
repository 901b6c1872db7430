//! What holds for every model in the table.

use crate::model::{CreateError, Kind, Parts, models};
use base::Timers;
use base::props::Bag;
use block::{Image, OpenOptions};
use bus::virtio::VirtioDevice;
use bus::virtio::testing::{Guest, TRANSPORTS, ram};
use bus::{Chardev, NullChardev, RegionId, System};
use memory::GuestMemory;
use proptest::prelude::*;
use std::sync::Arc;
use tempfile::NamedTempFile;

/// Gives devices what they ask for.
struct Workshop {
    memory: GuestMemory,
    timers: Timers,
    system: System,
    disk: NamedTempFile,
    displays: Arc<display::Displays>,
}

impl Workshop {
    fn new() -> Self {
        let disk = NamedTempFile::new().unwrap();
        disk.as_file().set_len(64 << 10).unwrap();
        Self {
            memory: ram(),
            timers: Timers::new(),
            system: System::new(|_| {}),
            disk,
            displays: Arc::new(display::Displays::new().unwrap()),
        }
    }

    /// A device of the model, with everything it requires.
    fn build(&mut self, name: &str) -> Box<dyn VirtioDevice> {
        let bag = match name {
            "virtio-blk" => Bag::new(name).with("drive", "d0").with("num-queues", 2),
            "virtio-console" => Bag::new(name).with("chardev", "c0"),
            "virtio-net" => Bag::new(name).with("netdev", "n0"),
            _ => Bag::new(name),
        };
        let model = models().iter().find(|m| m.name == name).unwrap();
        let Kind::Virtio(create) = model.kind else { panic!("{name} is not a virtio device") };
        create(&bag.with("packed", true), self).unwrap()
    }
}

impl Parts for Workshop {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }
    fn timers(&self) -> &Timers {
        &self.timers
    }
    fn system(&self) -> &System {
        &self.system
    }
    fn irqs(&self) -> Arc<dyn accel::Irqs> {
        Arc::new(bus::virtio::testing::Notes::default())
    }
    fn displays(&self) -> Result<Arc<display::Displays>, CreateError> {
        Ok(self.displays.clone())
    }
    fn offer_bus(&mut self, _: crate::ChildBus) {}
    fn take_drive(&mut self, _: &str) -> Result<Arc<Image>, CreateError> {
        let options = OpenOptions::reader(Some("raw"));
        let path = self.disk.path().to_str().unwrap();
        Ok(Arc::new(Image::open(path, &options).map_err(|e| CreateError::Other(e.to_string()))?))
    }
    fn take_chardev(&mut self, _: &str) -> Result<Arc<dyn Chardev>, CreateError> {
        Ok(Arc::new(NullChardev))
    }
    fn take_netdev(&mut self, _: &str) -> Result<crate::Cable, CreateError> {
        let spec = net::user::Spec { restrict: true, ..Default::default() };
        let (netdev, _) = net::user::open("n0", &spec).map_err(|e| CreateError::Other(e.to_string()))?;
        Ok(crate::Cable { netdev, mac: net::MacAddr::default_for(0) })
    }
}

fn names() -> Vec<&'static str> {
    models().iter().filter(|m| matches!(m.kind, Kind::Virtio(_))).map(|m| m.name).collect()
}

#[test]
fn every_property_has_a_description_and_unknown_ones_are_named() {
    for name in names() {
        let model = models().iter().find(|m| m.name == name).unwrap();
        let properties = (model.properties)();
        assert!(properties.names().any(|p| p == "packed"), "{name}: ring properties");
        for p in &properties.0 {
            assert!(!p.about.is_empty(), "{name}: {}", p.name);
        }
        let Kind::Virtio(create) = model.kind else { continue };
        let error = create(&Bag::new(name).with("pakced", true), &mut Workshop::new()).err().unwrap();
        assert!(error.to_string().contains("did you mean 'packed'?"), "{error}");
    }
}

#[test]
fn life_cycles() {
    for name in names() {
        for transport in TRANSPORTS {
            let mut shop = Workshop::new();
            let device = shop.build(name);
            let (queues, bare) = (device.queue_sizes().len() as u16, device.save().unwrap());
            assert_eq!(device.name(), name);
            assert!(device.queue_sizes().iter().all(|n| n.is_power_of_two()));
            let mut guest = Guest::new(device, transport, true);
            let fresh = guest.device().save().unwrap();
            guest.reset();
            guest.reset();
            guest.device().pause().unwrap();
            guest.device().pause().unwrap();
            guest.device().start().unwrap();
            guest.device().start().unwrap();
            for features in [0, u64::MAX] {
                guest.bring_up(features, queues);
                guest = guest.migrate(shop.build(name));
                guest.reset();
            }
            guest.device().pause().unwrap();
            let state = guest.device().save().unwrap();
            guest.device().load(state.clone()).unwrap();
            assert_eq!(guest.device().save().unwrap(), state);
            assert_eq!(state.data["core"]["queues"], fresh.data["core"]["queues"], "as good as new");
            assert_eq!(shop.build(name).save().unwrap(), bare);
            let mut other = state;
            other.kind = "toaster".into();
            assert!(guest.device().load(other).is_err());
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read(u32, u64, usize),
    Write(u32, u64, Vec<u8>),
    Ring(u64, Vec<u8>),
    Notify(u16),
    PauseSaveLoadStart,
    Reset,
    BringUp(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop::sample::select(vec![1usize, 2, 4, 8]);
    let byte = || prop_oneof![Just(0u8), 0u8..16, any::<u8>()];
    let data = len.clone().prop_flat_map(move |n| prop::collection::vec(byte(), n));
    let offset = || prop_oneof![3 => 0u64..0x120, 2 => 0x2000u64..0x2040, 1 => 0u64..0x4000];
    let region = || prop::sample::select(vec![0u32, 1, 4]);
    // Ring memory: descriptors, available and used parts of two queues.
    let part = (0u64..2, prop::sample::select(vec![0u64, 0x8000, 0xc000]), 0u64..0x40);
    let ring = part.prop_map(|(queue, part, at)| queue << 16 | part | at);
    let one = prop_oneof![
        3 => (region(), offset(), len).prop_map(|(r, o, n)| Step::Read(r, o, n)),
        4 => (region(), offset(), data.clone()).prop_map(|(r, o, d)| Step::Write(r, o, d)),
        12 => (ring, data).prop_map(|(at, d)| Step::Ring(at, d)),
        6 => (0u16..3).prop_map(Step::Notify),
        1 => Just(Step::PauseSaveLoadStart),
        1 => Just(Step::Reset),
        2 => any::<u64>().prop_map(Step::BringUp),
    ];
    prop::collection::vec(one, 1..100)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Registers and rings take anything at any time, with worker threads running.
    #[test]
    fn any_guest_is_survived(
        name in prop::sample::select(names()),
        transport in prop::sample::select(TRANSPORTS.to_vec()),
        list in steps(),
    ) {
        let mut shop = Workshop::new();
        let device = shop.build(name);
        let queues = device.queue_sizes().len() as u16;
        let mut guest = Guest::new(device, transport, true);
        guest.bring_up(!(1 << 34), queues);
        for step in list {
            match step {
                Step::Read(region, offset, len) => {
                    guest.device().read(RegionId(region), offset, &mut vec![0xff; len]);
                }
                Step::Write(region, offset, data) => guest.device().write(RegionId(region), offset, &data),
                Step::Ring(at, data) => guest.mem.write(at, &data).unwrap(),
                Step::Notify(queue) => guest.notify(queue),
                Step::PauseSaveLoadStart => {
                    guest.device().pause().unwrap();
                    let state = guest.device().save().unwrap();
                    guest.device().load(state).unwrap();
                    guest.device().start().unwrap();
                }
                Step::Reset => guest.reset(),
                Step::BringUp(features) => {
                    guest.negotiate(features);
                    for _ in 0..queues {
                        guest.add_queue(None, features);
                    }
                    guest.ready();
                }
            }
        }
        guest.device().pause().unwrap();
        guest.device().reset();
    }
}
