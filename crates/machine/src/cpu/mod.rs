//! Processor models: what `--cpu NAME[,+feature][,-feature][,property=value]` means for a guest's CPUID.
//!
//! Names of models and features are QEMU's. What differs on purpose: a feature asked for by name that the accelerator does
//! not have is an error unless `enforce=off`; what a model has beyond the accelerator is left out with a warning that names it,
//! or refused with `enforce=on`.

mod apply;
mod caches;
pub mod features;
pub mod models;
mod query;
mod request;

pub use apply::{Resolved, resolve};
pub use query::{
    Comparison, Definition, Expansion, baseline, compare, definitions, expand, feature_list, help,
};
pub use request::{Base, CpuSpec, Request, parse};

/// A processor that cannot be given.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpuError {
    /// No such model, feature or value.
    #[error(transparent)]
    Property(#[from] base::props::PropError),
    /// Features that the accelerator does not have.
    #[error(
        "CPU '{model}': this accelerator has no {features}; leave them out, or say enforce=off to go without"
    )]
    Missing {
        /// Name of the model.
        model: String,
        /// Names and bits, with commas between.
        features: String,
    },
    /// Another value that the accelerator cannot give.
    #[error("CPU '{model}': {text}")]
    Unsupported {
        /// Name of the model.
        model: String,
        /// What, and what to do instead.
        text: String,
    },
}
