//! `pipe`: two named pipes, `PATH.in` and `PATH.out`, or one that is both.

use crate::pump::Pump;
use crate::{Error, Kind, Result, host, stream};
use base::props::Properties;
use bus::{CharEvent, CharFrontend, Chardev};
use schemars::JsonSchema;
use serde::Deserialize;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Spec {
    /// The pipes are PATH.in (for input) and PATH.out; without them PATH is both.
    path: PathBuf,
}

pub(crate) const KIND: Kind = Kind {
    name: "pipe",
    about: "Named pipes PATH.in and PATH.out",
    properties: Properties::of::<Spec>,
    open: |bag| {
        let spec: Spec = bag.spec()?;
        if spec.path.as_os_str().is_empty() {
            return Err(Error::Config("chardev: pipe: no device path given: use path=PATH".into()));
        }
        Ok(open(spec)?)
    },
};

struct Pipe {
    out: File,
    pump: Arc<Pump>,
}

fn open(spec: Spec) -> Result<Arc<Pipe>> {
    let path = spec.path;
    let with = |suffix: &str| {
        let mut name = path.clone().into_os_string();
        name.push(suffix);
        PathBuf::from(name)
    };
    // Opened for both, so that neither the open nor a read ends while nobody is at the other end.
    let both = |path: &PathBuf| File::options().read(true).write(true).open(path);
    let (input, out) = match (both(&with(".in")), both(&with(".out"))) {
        (Ok(input), Ok(out)) => (input, out),
        _ => {
            let one = both(&path).map_err(host(format!(
                "cannot open the pipes '{0}.in' and '{0}.out', nor '{0}'",
                path.display()
            )))?;
            (one.try_clone().map_err(host("cannot duplicate a descriptor"))?, one)
        }
    };
    stream::nonblocking(&out).map_err(host("pipe"))?;
    let pump = Arc::new(Pump::default());
    pump.event(CharEvent::Opened);
    let mine = pump.clone();
    stream::thread("pipe", move || stream::read_all(input.as_fd(), &mine, |_| ()))?;
    Ok(Arc::new(Pipe { out, pump }))
}

impl Chardev for Pipe {
    fn write(&self, data: &[u8]) {
        stream::write(self.out.as_fd(), data, false);
    }

    fn write_all(&self, data: &[u8]) {
        stream::write(self.out.as_fd(), data, true);
    }

    fn attach(&self, frontend: Arc<dyn CharFrontend>) {
        self.pump.attach(frontend);
    }

    fn resume_input(&self) {
        self.pump.resume();
    }

    fn filename(&self) -> String {
        "pipe".into()
    }
}
