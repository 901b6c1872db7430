//! PCI functions of chipsets that have nothing but their configuration space: a write to it, reset and load are followed
//! by `apply`, which puts what the registers say into effect.

/// Implements `Device` and `PciFunction` for such a type, which has a field `config` and a method `apply`.
macro_rules! chipset_function {
    ($type:ty, $kind:expr) => {
        impl bus::Device for $type {
            fn name(&self) -> &str {
                $kind
            }

            fn read(&mut self, _: bus::RegionId, _: u64, _: &mut [u8]) {}

            fn write(&mut self, _: bus::RegionId, _: u64, _: &[u8]) {}

            fn reset(&mut self) {
                self.config.reset();
                self.apply();
            }

            fn save(&self) -> Result<bus::State, bus::StateError> {
                bus::State::new($kind, 1, &self.config.save())
            }

            fn load(&mut self, state: bus::State) -> Result<(), bus::StateError> {
                self.config.load(state.unpack::<bus::pci::ConfigSaved>($kind, 1)?)?;
                self.apply();
                Ok(())
            }
        }

        impl bus::pci::PciFunction for $type {
            fn config(&self) -> &bus::pci::Config {
                &self.config
            }

            fn config_mut(&mut self) -> &mut bus::pci::Config {
                &mut self.config
            }

            fn write_config(&mut self, offset: u16, data: &[u8]) {
                self.config.write(offset, data);
                // The chipset's own registers are behind the standard header.
                if offset >= 0x40 {
                    self.apply();
                }
            }
        }
    };
}

pub(super) use chipset_function;
