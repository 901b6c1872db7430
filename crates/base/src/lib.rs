//! Small things that every part shares.

mod event;
mod limit;
mod suggest;
mod timer;
pub mod props;
pub mod tsc;

pub use event::EventFd;
pub use limit::RateLimit;
pub use suggest::nearest;
pub use timer::{Timer, Timers};
