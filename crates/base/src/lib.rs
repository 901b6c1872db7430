//! Small things that every part shares.

mod event;
mod limit;
pub mod props;
mod suggest;
mod timer;
pub mod tsc;

pub use event::EventFd;
pub use limit::RateLimit;
pub use suggest::nearest;
pub use timer::{Timer, Timers};
