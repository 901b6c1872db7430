//! Which accelerator runs the guest, and why.

use crate::{Error, Result};
use accel::Accel;
use accel::kvm::{self, KvmAccel};
use base::nearest;
use base::props::Bag;
use softcpu::{SoftAccel, SoftSpec};
use std::sync::Arc;

/// An accelerator and the reason for it.
pub struct Acceleration {
    /// The accelerator.
    pub accel: Arc<dyn Accel>,
    /// One line for the user.
    pub reason: String,
}

/// Chooses what `--accel` asks for: `kvm`, `soft` (also called `tcg`), or `auto`.
///
/// A `/dev/kvm` that opens is no proof (hosts offer page-table based ones that cannot run ordinary guests), so `auto`
/// wants the processor flag as well.
///
/// # Errors
/// An unknown name, or one that this host cannot provide.
pub fn choose(bag: &Bag) -> Result<Acceleration> {
    match bag.driver.as_str() {
        "kvm" => {
            no_options(bag)?;
            let accel = KvmAccel::open()?;
            Ok(Acceleration { accel: Arc::new(accel), reason: "KVM, as asked".into() })
        }
        "soft" | "tcg" => Ok(Acceleration { accel: soft(bag)?, reason: "the software CPU, as asked".into() }),
        "auto" => {
            no_options(bag)?;
            let probe = kvm::probe();
            if probe.usable() {
                return Ok(Acceleration {
                    accel: Arc::new(KvmAccel::open()?),
                    reason: format!("KVM: {}", probe.reason),
                });
            }
            Ok(Acceleration { accel: soft(bag)?, reason: format!("the software CPU: {}", probe.reason) })
        }
        other => {
            let near = nearest(other, ["kvm", "soft", "auto", "tcg"])
                .map(|n| format!("did you mean '{n}'? "))
                .unwrap_or_default();
            Err(Error::Config(format!("unknown accelerator '{other}': {near}use kvm, soft or auto")))
        }
    }
}

fn soft(bag: &Bag) -> Result<Arc<dyn Accel>> {
    Ok(Arc::new(SoftAccel::new(bag.spec::<SoftSpec>()?)?))
}

fn no_options(bag: &Bag) -> Result<()> {
    match bag.props.keys().next() {
        None => Ok(()),
        Some(key) => Err(Error::Config(format!("accelerator '{}' has no option '{key}'", bag.driver))),
    }
}

/// Whether KVM can run ordinary guests on this host.
pub fn kvm_usable() -> bool {
    kvm::probe().usable()
}
