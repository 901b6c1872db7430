//! Virtual machines that are kept: `create`, `start`, `ls`, `rm`, and the names that `run` knows. Each is a directory
//! ([`store`]) with its disk, its seed and a description; starting one is `kvasir run` with the arguments that follow
//! from it.

mod create;
mod keys;
mod list;
mod progress;
mod start;
mod store;

pub(crate) use create::{Args as CreateArgs, main as create};
pub(crate) use list::{ListArgs, RemoveArgs, list, remove};
pub(crate) use start::{Args as StartArgs, main as start, named};
