//! Character devices that are not the terminal.

use crate::Failure;
use base::props::Bag;
use bus::{CharFrontend, Chardev, NullChardev};
use schemars::JsonSchema;
use serde::Deserialize;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Output into a file; no input.
struct FileChardev(Mutex<File>);

impl Chardev for FileChardev {
    fn write(&self, data: &[u8]) {
        let mut file = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(e) = file.write_all(data) {
            tracing::warn!("character device file: {e}");
        }
    }
    fn attach(&self, _: Arc<dyn CharFrontend>) {}
    fn resume_input(&self) {}
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct FileSpec {
    /// File to write to.
    path: PathBuf,
    /// Append instead of truncating.
    append: bool,
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct NoSpec {}

/// Opens a file as character device.
pub(crate) fn file(path: PathBuf, append: bool) -> Result<Arc<dyn Chardev>, Failure> {
    let mut options = File::options();
    options.create(true).append(append).write(true).truncate(!append);
    let file = options
        .open(&path)
        .map_err(|e| Failure::usage(format!("cannot open '{}' for output: {e}", path.display())))?;
    Ok(Arc::new(FileChardev(Mutex::new(file))))
}

/// Makes what `--chardev KIND,id=ID,...` asks for.
pub(crate) fn open(text: &str) -> Result<(String, Arc<dyn Chardev>), Failure> {
    let bag = Bag::parse(text, "backend")?;
    let id = bag.id.clone().ok_or_else(|| Failure::usage(format!("--chardev {text}: missing id=")))?;
    let chardev: Arc<dyn Chardev> = match bag.driver.as_str() {
        "null" => {
            bag.spec::<NoSpec>()?;
            Arc::new(NullChardev)
        }
        "file" => {
            let spec: FileSpec = bag.spec()?;
            if spec.path.as_os_str().is_empty() {
                return Err(Failure::usage(format!("--chardev {text}: missing path=")));
            }
            file(spec.path, spec.append)?
        }
        other => {
            let near = base::nearest(other, ["null", "file"])
                .map(|n| format!("; did you mean '{n}'?"))
                .unwrap_or_default();
            return Err(Failure::usage(format!(
                "--chardev: unknown backend '{other}': use null or file{near}"
            )));
        }
    };
    Ok((id, chardev))
}
