//! `file`: output into a file, and input from another if there is one.

use crate::pump::Pump;
use crate::{Error, Kind, Result, host, stream};
use base::props::Properties;
use bus::{CharEvent, CharFrontend, Chardev};
use schemars::JsonSchema;
use serde::Deserialize;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Spec {
    /// File to write to.
    path: PathBuf,
    /// File to read from.
    input_path: Option<PathBuf>,
    /// Append instead of truncating.
    append: bool,
}

pub(crate) const KIND: Kind = Kind {
    name: "file",
    about: "Output into a file",
    properties: Properties::of::<Spec>,
    open: |bag| {
        let spec: Spec = bag.spec()?;
        if spec.path.as_os_str().is_empty() {
            return Err(Error::Config("chardev: file: no filename given: use path=FILE".into()));
        }
        Ok(open(spec)?)
    },
};

struct FileChardev {
    out: Mutex<File>,
    pump: Arc<Pump>,
}

fn open(spec: Spec) -> Result<Arc<FileChardev>> {
    let mut options = File::options();
    options.create(true).append(spec.append).write(true).truncate(!spec.append);
    let out = options
        .open(&spec.path)
        .map_err(host(format!("cannot open '{}' for output", spec.path.display())))?;
    let pump = Arc::new(Pump::default());
    pump.event(CharEvent::Opened);
    if let Some(path) = spec.input_path {
        let input = File::open(&path).map_err(host(format!("cannot open '{}' for input", path.display())))?;
        let pump = pump.clone();
        stream::thread("file", move || stream::read_all(input.as_fd(), &pump, |_| ()))?;
    }
    Ok(Arc::new(FileChardev { out: Mutex::new(out), pump }))
}

impl Chardev for FileChardev {
    fn write(&self, data: &[u8]) {
        let mut file = self.out.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(e) = file.write_all(data) {
            tracing::warn!("character device file: {e}");
        }
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        self.pump.attach(frontend);
    }

    fn resume_input(&self) {
        self.pump.resume();
    }

    fn filename(&self) -> String {
        "file".into()
    }
}
