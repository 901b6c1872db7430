//! The bus that a controller brings: where devices are plugged.

use super::UsbDevice;
use super::xhci::Core;
use crate::CreateError;
use std::sync::{Arc, Mutex, Weak};

/// A USB bus: the ports of a controller, and of the hubs behind them.
#[derive(Clone)]
pub struct UsbBus(pub(super) Weak<Mutex<Core>>);

impl UsbBus {
    fn core(&self) -> Option<Arc<Mutex<Core>>> {
        self.0.upgrade()
    }

    /// Whether a port of the controller or of a hub is free.
    pub fn has_room(&self) -> bool {
        self.core().is_some_and(|core| core.lock().unwrap_or_else(|e| e.into_inner()).has_room())
    }

    /// Plugs a device into `port=` (`N`, `N.M` behind a hub), or into the first free port.
    ///
    /// # Errors
    /// No such port, or it is taken.
    pub(super) fn plug(
        &self,
        name: &str,
        port: Option<&str>,
        device: Box<dyn UsbDevice>,
    ) -> Result<(), CreateError> {
        let wrong = |text: String| CreateError::Other(format!("{name}: {text}"));
        let core = self.core().ok_or_else(|| wrong("the controller is gone".into()))?;
        let path: Option<Vec<u8>> = match port {
            None => None,
            Some(text) => {
                let numbers: Result<Vec<u8>, _> = text.split('.').map(str::parse).collect();
                match numbers {
                    // Five tiers of hubs (USB 2.0, 4.1.1).
                    Ok(n) if !n.contains(&0) && n.len() <= 6 => Some(n),
                    _ => return Err(wrong(format!("port={text}: use N, or N.M behind a hub, from 1 up"))),
                }
            }
        };
        let mut core = core.lock().unwrap_or_else(|e| e.into_inner());
        core.plug(path.as_deref(), device).map_err(|_| match port {
            Some(port) => wrong(format!("port={port} does not exist or is taken")),
            None => wrong("no USB port is free; add a usb-hub before it".into()),
        })
    }
}
