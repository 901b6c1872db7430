//! Descriptors that clients hand over along with commands.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use crate::context::lock;
use bus::Chardev;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

pub(super) const COMMANDS: &[Command] = &[
    command!("getfd", getfd),
    command!("closefd", closefd),
    command!("add-fd", add_fd),
    command!("remove-fd", remove_fd),
    command!("query-fdsets", query_fdsets),
];

thread_local! {
    /// The connection whose command this thread runs.
    static SESSION: RefCell<Option<Arc<dyn Chardev>>> = const { RefCell::new(None) };
}

/// Runs `f` with `chardev` as the connection that descriptors come from.
pub(super) fn with_session(chardev: &Arc<dyn Chardev>, f: impl FnOnce()) {
    SESSION.with(|s| *s.borrow_mut() = Some(chardev.clone()));
    f();
    SESSION.with(|s| *s.borrow_mut() = None);
}

fn received() -> Result<OwnedFd> {
    let fds = SESSION.with(|s| s.borrow().as_ref().map(|c| c.take_fds()));
    fds.unwrap_or_default().pop().ok_or_else(|| Error::generic("No file descriptor supplied via SCM_RIGHTS"))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FdName {
    /// Name for later commands.
    fdname: String,
}

fn getfd(c: &Context, a: FdName) -> Result<Empty> {
    let fd = received()?;
    if a.fdname.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Error::generic("Parameter 'fdname' expects a name not starting with a digit"));
    }
    lock(&c.fds).named.insert(a.fdname, fd);
    Ok(Empty {})
}

fn closefd(c: &Context, a: FdName) -> Result<Empty> {
    match lock(&c.fds).named.remove(&a.fdname) {
        Some(_) => Ok(Empty {}),
        None => Err(Error::generic(format!("File descriptor named '{}' not found", a.fdname))),
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct AddFd {
    /// Set to add to; a new one if not given.
    fdset_id: Option<i64>,
    /// Text for the user.
    opaque: Option<String>,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct AddedFd {
    fdset_id: i64,
    fd: i32,
}

fn add_fd(c: &Context, a: AddFd) -> Result<AddedFd> {
    let fd = received()?;
    if a.fdset_id.is_some_and(|id| id < 0) {
        return Err(Error::generic("Parameter 'fdset-id' expects a non-negative value"));
    }
    let mut fds = lock(&c.fds);
    let fdset_id =
        a.fdset_id.unwrap_or_else(|| (0..).find(|id| !fds.sets.contains_key(id)).unwrap_or_default());
    let number = fd.as_raw_fd();
    fds.sets.entry(fdset_id).or_default().push((number, a.opaque, fd));
    Ok(AddedFd { fdset_id, fd: number })
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RemoveFd {
    fdset_id: i64,
    fd: Option<i32>,
}

fn remove_fd(c: &Context, a: RemoveFd) -> Result<Empty> {
    let mut fds = lock(&c.fds);
    let not_found = || {
        let fd = a.fd.map(|fd| format!(", fd:{fd}")).unwrap_or_default();
        Error::generic(format!("File descriptor named 'fdset-id:{}{fd}' not found", a.fdset_id))
    };
    let set = fds.sets.get_mut(&a.fdset_id).ok_or_else(not_found)?;
    match a.fd {
        None => set.clear(),
        Some(fd) => {
            let before = set.len();
            set.retain(|(number, ..)| *number != fd);
            if set.len() == before {
                return Err(not_found());
            }
        }
    }
    if set.is_empty() {
        fds.sets.remove(&a.fdset_id);
    }
    Ok(Empty {})
}

/// A descriptor of a set.
#[derive(Serialize, JsonSchema)]
struct FdInfo {
    fd: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    opaque: Option<String>,
}

/// A set.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct FdSet {
    fdset_id: i64,
    fds: Vec<FdInfo>,
}

fn query_fdsets(c: &Context, _: Empty) -> Result<Vec<FdSet>> {
    let fds = lock(&c.fds);
    Ok(fds
        .sets
        .iter()
        .map(|(id, set)| FdSet {
            fdset_id: *id,
            fds: set.iter().map(|(fd, opaque, _)| FdInfo { fd: *fd, opaque: opaque.clone() }).collect(),
        })
        .collect())
}
