//! Network backends of a machine, by id.

use crate::{Error, Result};
use base::nearest;
use base::props::Bag;
use devices::{Cable, CreateError};
use net::{Counters, Link, MacAddr, Netdev, user};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What stays of a backend with the machine while a device has it.
#[derive(Clone, Debug)]
pub struct NetdevInfo {
    /// Its id.
    pub id: String,
    /// Its kind.
    pub kind: &'static str,
    /// One line.
    pub about: String,
    /// The cable.
    pub link: Arc<Link>,
    /// What went through.
    pub counters: Arc<Counters>,
    /// Changes a user-mode network.
    pub user: Option<user::Control>,
}

/// Backends, waiting for the device that takes each.
#[derive(Default)]
pub(crate) struct Netdevs {
    waiting: BTreeMap<String, Netdev>,
    taken: Vec<String>,
    infos: Vec<NetdevInfo>,
}

impl Netdevs {
    /// Opens the backends of all bags.
    pub(crate) fn open(bags: &[Bag]) -> Result<Self> {
        let mut all = Self::default();
        for bag in bags {
            let opened = net::open(bag)?;
            let netdev = opened.netdev;
            let id = netdev.id.clone();
            all.infos.push(NetdevInfo {
                id: id.clone(),
                kind: netdev.kind,
                about: netdev.about.clone(),
                link: netdev.link.clone(),
                counters: netdev.counters.clone(),
                user: opened.user,
            });
            if all.waiting.insert(id.clone(), netdev).is_some() {
                return Err(Error::Config(format!("there are two netdevs with the id '{id}'")));
            }
        }
        Ok(all)
    }

    /// What the backends are.
    pub(crate) fn infos(&self) -> &[NetdevInfo] {
        &self.infos
    }

    /// The backend for a device.
    pub(crate) fn take(&mut self, id: &str) -> std::result::Result<Cable, CreateError> {
        if let Some(netdev) = self.waiting.remove(id) {
            let mac = MacAddr::default_for(self.taken.len() as u8); // after 256 cards users name them
            self.taken.push(id.into());
            return Ok(Cable { netdev, mac });
        }
        if self.taken.iter().any(|t| t == id) {
            return Err(CreateError::Other(format!("netdev '{id}' is in use by another device")));
        }
        let near =
            nearest(id, self.waiting.keys().map(String::as_str)).map(|n| format!("; did you mean '{n}'?"));
        Err(CreateError::Other(format!("there is no netdev '{id}'{}", near.unwrap_or_default())))
    }
}
