//! Further files of an image, where a test allows none.

use block::{Error, Result, formats::Siblings, storage::Storage};
use std::sync::Arc;

pub struct Alone;

impl Siblings for Alone {
    fn open(&self, _name: &str, _read_only: bool) -> Result<Arc<dyn Storage>> {
        Err(Error::unsupported("no further files here"))
    }

    fn create(&self, _name: &str, _size: u64) -> Result<Arc<dyn Storage>> {
        Err(Error::unsupported("no further files here"))
    }
}
