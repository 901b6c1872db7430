//! UEFI's variable store: a file of its own for each machine, made from the firmware's template.

use super::check_size;
use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

/// A variable store.
#[derive(Debug)]
pub(crate) struct Vars {
    /// What is in it now.
    pub(crate) contents: Vec<u8>,
    /// Where changes are kept; locked.
    pub(crate) store: Option<File>,
}

/// Opens the store at `path`, which is made from `template` if it is not there; without a path, what the guest changes
/// is forgotten with the machine.
pub(super) fn open(path: Option<&Path>, template: Option<&Path>) -> Result<Vars> {
    let Some(path) = path else {
        let template = template.ok_or_else(|| no_template("the variable store"))?;
        return Ok(Vars { contents: super::read(template)?, store: None });
    };
    let fail = |source| Error::Host { what: format!("variable store '{}'", path.display()), source };
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::Config(format!(
                "another machine uses the variable store '{}'; give this one its own with vars=",
                path.display()
            )));
        }
        Err(TryLockError::Error(e)) => return Err(fail(e)),
    }
    let mut contents = Vec::new();
    (&file).take(super::LARGEST + 1).read_to_end(&mut contents).map_err(fail)?;
    if contents.is_empty() {
        let template = template.ok_or_else(|| no_template(&path.display().to_string()))?;
        contents = super::read(template)?;
        file.rewind().map_err(fail)?;
        file.write_all(&contents).map_err(fail)?;
    }
    check_size(path, contents.len() as u64)?;
    Ok(Vars { contents, store: Some(file) })
}

fn no_template(what: &str) -> Error {
    Error::Config(format!(
        "{what} does not exist, and there is no template to make it from: give vars-template="
    ))
}
