//! `none`: no hardware at all, for asking the program about itself through a monitor.

use super::{Board, Builder};
use crate::Result;
use crate::blueprint::BoardSpec;

pub(super) const BOARD: Board =
    Board { name: "none", about: "empty machine", product: "none", firmware: false, low_ram_end, build };

fn low_ram_end(_: u64) -> u64 {
    3 << 30
}

fn build(_: &mut Builder, _: &BoardSpec) -> Result<()> {
    Ok(())
}
