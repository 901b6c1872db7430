//! Image formats: what the traits demand, and the table of all formats.
//!
//! A format is a module with a `pub static DRIVER: Driver`; adding one is its name in the [`formats!`] line below.

mod api;
pub(crate) mod crypto;
mod support;

pub use api::*;

/// Declares the modules and the table.
macro_rules! formats {
    ($($name:ident),* $(,)?) => {
        $(pub mod $name;)*
        /// Every format, in the order in which probing prefers them.
        pub static FORMATS: &[&Driver] = &[$(&$name::DRIVER),*];
    };
}

formats! {
    qcow2,
    vdi,
    vpc,
    vmdk,
    vhdx,
    qed,
    parallels,
    qcow,
    luks,
    bochs,
    cloop,
    dmg,
    raw,
}

/// The format called `name`.
pub fn find(name: &str) -> Option<&'static Driver> {
    FORMATS.iter().find(|d| d.name == name).copied()
}

/// The best match for an image's beginning; `raw` if nothing else recognises it.
pub fn probe(input: &ProbeInput<'_>) -> &'static Driver {
    let mut best = (0, &raw::DRIVER);
    for driver in FORMATS {
        let score = (driver.probe)(input);
        if score > best.0 {
            best = (score, driver);
        }
    }
    best.1
}
